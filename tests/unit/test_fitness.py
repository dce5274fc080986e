"""The engine against a plain oracle: one full forward pass per candidate, with full logits of the dense model."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CONFIGS, LENGTH, build, save, tokens

from evopress.compression.base import Level, Unit
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.models.structure import linear_layers
from evopress.search.engine.evaluator import ModelEvaluator, even_slices
from evopress.search.engine.forward import plan_block
from evopress.search.engine.memory import MemoryPlan, block_weights, plan_memory
from evopress.search.engine.objectives import make_objective
from evopress.search.engine.weights import Counters, SideStream, VariantBlocks, WeightCache
from evopress.search.evaluation import Minibatch
from evopress.util import metrics, progress
from evopress.util.errors import ConfigError

CPU = torch.device("cpu")
LEVELS = 3
PLENTY = MemoryPlan(weights=1 << 30, hidden=1 << 30, run_tokens=4096, score_tokens=4096)
MINIBATCH = Minibatch((0, 2, 3, 1), (12, 12, 12, 5))


class Fixture:
    """A tiny model with made-up variants of its linear layers: level 0 is the farthest from dense, level 2 is dense."""

    def __init__(self, name: str, folder: Path, dtype=torch.float32, skip=()):
        self.model = build(name).to(dtype)
        self.folder = save(self.model, folder)
        self.ids = tokens(count=5)
        blockwise = self.open()
        self.units = [
            Unit(f"{block}.{layer}", index, layer, "all", 1, tuple(Level(str(k), k, k, 1) for k in range(LEVELS)))
            for index, (block, module) in enumerate(zip(blockwise.block_names, blockwise.blocks, strict=True))
            for layer in linear_layers(module)
            if not any(pattern in layer for pattern in skip)
        ]
        self.prefix = blockwise.block_names
        self.checks = 0

    def open(self) -> BlockwiseModel:
        return BlockwiseModel.from_folder(self.folder, CPU, resident=False)

    def unpack(self, block: int, layer: str, level: str) -> torch.Tensor:
        weight = self.model.get_submodule(f"{self.prefix[block]}.{layer}").weight.detach()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000 * block + len(layer)))
        return (weight + (LEVELS - 1 - int(level)) * 0.05 * noise).to(weight.dtype)

    def check(self) -> None:
        self.checks += 1

    def evaluator(self, objective=None, memory=PLENTY, counters=None) -> ModelEvaluator:
        model, counters = self.open(), counters or Counters()
        dense = final_hidden(model, self.ids, memory.run_tokens, "dense model", self.check)
        blocks = VariantBlocks(model, self.units, self.unpack, memory.weights, counters)
        return ModelEvaluator(
            blocks, self.ids, dense, objective or make_objective("kl", 1), memory, counters, self.check
        )

    def candidates(self, count=6) -> np.ndarray:
        """A parent, its mutants in late and early blocks, a duplicate, and one that shares nothing."""
        rng = np.random.default_rng(0)
        parent = np.ones(len(self.units), dtype=np.int16)
        made = [parent]
        for _ in range(count - 3):
            child = parent.copy()
            child[rng.choice(len(child), 2, replace=False)] = [0, 2]
            made.append(child)
        return np.array([*made, made[1], np.zeros_like(parent)], dtype=np.int16)

    def oracle(self, candidates: np.ndarray, minibatch: Minibatch, name="kl", k=1) -> list[list[float]]:
        """Mean per sequence, in float64 from the model's own logits."""
        rows = []
        sequences = [self.ids[row, :n][None] for row, n in zip(minibatch.sequences, minibatch.lengths, strict=True)]
        with torch.no_grad():
            teachers = [self.model(ids, use_cache=False).logits[0].double() for ids in sequences]
            for candidate in candidates:
                weights = {
                    f"{unit.name}.weight": self.unpack(unit.block, unit.layer, str(level))
                    for unit, level in zip(self.units, candidate, strict=True)
                }
                swapped = [
                    torch.func.functional_call(
                        self.model, weights, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False
                    )
                    .logits[0]
                    .double()
                    for ids in sequences
                ]
                rows.append([plain(name, k, *each) for each in zip(teachers, swapped, sequences, strict=True)])
        return rows


def plain(name: str, k: int, teacher: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> float:
    p, q = teacher.softmax(-1), logits.softmax(-1)
    if name == "perplexity":
        return float(-q[:-1].log().gather(1, ids[0, 1:, None]).mean())
    if name == "topk_kl":
        top = p.topk(k).indices
        p, q = (torch.cat([x.gather(1, top), x.scatter(1, top, 0).sum(1, keepdim=True)], 1) for x in (p, q))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Fixture:
    return Fixture("llama", tmp_path_factory.mktemp("fitness") / "llama")


def assert_oracle(fixture, evaluator, candidates, minibatch=MINIBATCH, name="kl", k=1, rtol=2e-4):
    """Tolerance: float32 logits near 10 round by 1e-6, and divergences here are near 0.1."""
    judged = evaluator.evaluate(candidates, minibatch)
    expected = np.array(fixture.oracle(candidates, minibatch, name, k))
    np.testing.assert_allclose([judgement.by_sequence for judgement in judged], expected, rtol=rtol, atol=2e-6)
    lengths = np.array(minibatch.lengths) - (name == "perplexity")
    np.testing.assert_allclose([j.fitness for j in judged], expected @ lengths / lengths.sum(), rtol=rtol, atol=2e-6)
    return judged


def test_a_long_judgement_tells_its_progress_block_by_block(llama, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress.log, "propagate", True)
    evaluator = llama.evaluator()
    with caplog.at_level("INFO", logger="evopress"):
        evaluator.evaluate(llama.candidates(), MINIBATCH)
    lines = [line for line in caplog.messages if line.startswith("evaluating ")]
    steps = int(lines[0].split("/")[1].split()[0])
    assert len(lines) == steps == 8  # whole sequences and the shorter one pass 3 blocks and the head each
    assert lines[-1].startswith("evaluating 5 candidates: 8/8 blocks, ")


@pytest.mark.parametrize("name", CONFIGS)
def test_fitness_equals_one_full_pass_per_candidate(name, tmp_path):
    fixture = Fixture(name, tmp_path)
    candidates = fixture.candidates()
    # These rotary embeddings depend on the length of a sequence, so a cut one differs from the start of a whole one.
    minibatch = Minibatch((0, 2, 3), (12, 12, 12)) if name == "phi3-longrope" else MINIBATCH
    judged = assert_oracle(fixture, fixture.evaluator(), candidates, minibatch)
    assert judged[1] == judged[-2]  # the duplicate
    assert len({judgement.fitness for judgement in judged}) == len(candidates) - 1


@pytest.mark.parametrize(
    ("name", "k"), [("kl", 1), ("topk_kl", 1), ("topk_kl", 10), ("topk_kl", 95), ("perplexity", 1)]
)
def test_every_objective_equals_its_formula(llama, name, k, monkeypatch):
    monkeypatch.setattr(metrics, "PIECE", 7 * 96)
    assert_oracle(llama, llama.evaluator(make_objective(name, k)), llama.candidates(), name=name, k=k)


def test_topk_over_the_whole_vocabulary_is_the_exact_divergence(llama):
    candidates = llama.candidates()
    whole, exact = (
        llama.evaluator(make_objective(*objective)).evaluate(candidates, MINIBATCH)
        for objective in (("topk_kl", 96), ("kl", 1))
    )
    np.testing.assert_allclose([j.fitness for j in whole], [j.fitness for j in exact], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "perplexity", "topk_kl"])
def test_positions_before_a_start_token_do_not_count(llama, name):
    counted = torch.ones_like(llama.ids, dtype=torch.bool)
    counted[0, 3] = counted[2, 0] = counted[2, 10] = counted[1, 4] = counted[1, 8] = False
    evaluator, candidates = llama.evaluator(make_objective(name, 3)), llama.candidates()
    evaluator.counted = counted
    lost = int(name == "perplexity")
    total = np.zeros(len(candidates))
    kept = 0
    for row, length in zip(MINIBATCH.sequences, MINIBATCH.lengths, strict=True):
        for position in range(length - lost):
            if counted[row, position]:
                total += alone(llama, candidates, row, position, name)
                kept += 1
    judged = evaluator.evaluate(candidates, MINIBATCH)
    assert kept == sum(MINIBATCH.lengths) - 4 - 4 * lost + lost  # a cut sequence ends on one that does not count
    np.testing.assert_allclose([j.fitness for j in judged], total / kept, rtol=2e-4, atol=2e-6)


def alone(fixture, candidates, row, position, name) -> np.ndarray:
    """Fitness of one position, from the difference of the means over a sequence cut behind and before it."""
    last = position + 1 + (name == "perplexity")
    upto = np.array(fixture.oracle(candidates, Minibatch((row,), (last,)), name, 3))[:, 0] * (position + 1)
    if not position:
        return upto
    return upto - np.array(fixture.oracle(candidates, Minibatch((row,), (last - 1,)), name, 3))[:, 0] * position


STATE = 2 * 12 * 32 * 4
"""Bytes of the hidden states of one sequence of 12 tokens, before and after a block."""


@pytest.mark.parametrize(
    "memory",
    [
        replace(PLENTY, run_tokens=1),
        replace(PLENTY, run_tokens=24),
        replace(PLENTY, run_tokens=30, score_tokens=7),
        replace(PLENTY, score_tokens=1),
        replace(PLENTY, hidden=1),
        replace(PLENTY, hidden=2 * STATE),
        replace(PLENTY, hidden=11 * STATE),
        replace(PLENTY, weights=1),
        replace(PLENTY, weights=40_000, hidden=7 * STATE, run_tokens=13, score_tokens=5),
    ],
    ids=str,
)
def test_chunks_change_nothing(llama, memory):
    assert_oracle(llama, llama.evaluator(memory=memory), llama.candidates(9))


@pytest.mark.parametrize("weights", [1 << 30, 1])
def test_excluded_layers_stay_dense_loaded_or_streamed(weights, tmp_path):
    fixture = Fixture("qwen3", tmp_path, skip=("down_proj",))
    evaluator = fixture.evaluator(memory=replace(PLENTY, weights=weights))
    assert_oracle(fixture, evaluator, fixture.candidates())
    once = sum(layer.weight.nbytes for name, layer in fixture.model.named_modules() if name.endswith("down_proj"))
    assert evaluator.counters.dense_bytes > once if weights == 1 else evaluator.counters.dense_bytes == once


def test_blocks_without_any_unit_are_run_once_for_all(tmp_path):
    fixture, counters = Fixture("llama", tmp_path, skip=("q_", "k_", "v_", "o_", "gate_", "up_")), Counters()
    fixture.units = [unit for unit in fixture.units if unit.block == 2]
    candidates = np.arange(LEVELS, dtype=np.int16)[:, None]
    assert_oracle(fixture, fixture.evaluator(counters=counters), candidates)
    assert counters.block_tokens == (1 + 1 + 3) * MINIBATCH.tokens


def test_bfloat16_is_judged_from_bfloat16_logits(tmp_path):
    fixture = Fixture("llama", tmp_path, dtype=torch.bfloat16)
    # Batches round bfloat16 activations differently; the noise of 8 bits of mantissa is what is allowed here.
    assert_oracle(fixture, fixture.evaluator(), fixture.candidates(), rtol=0.1)


def test_the_dense_levels_have_no_divergence(llama):
    dense = np.full((1, len(llama.units)), LEVELS - 1, dtype=np.int16)
    assert abs(llama.evaluator().evaluate(dense, MINIBATCH)[0].fitness) < 1e-6


def test_work_is_counted_and_shared_prefixes_run_once(llama):
    counters = Counters()
    evaluator = llama.evaluator(counters=counters)
    parent = np.ones(len(llama.units), dtype=np.int16)
    last = parent.copy()
    last[-1] = 0  # differs in the last block only
    evaluator.evaluate(np.stack([parent, last, parent]), MINIBATCH)
    tokens_run = MINIBATCH.tokens
    assert counters.block_tokens == (1 + 1 + 2) * tokens_run
    assert counters.block_tokens_alone == 2 * 3 * tokens_run
    assert counters.head_tokens == 3 * tokens_run
    assert counters.candidate_tokens == 3 * tokens_run
    assert counters.unpacked == len(llama.units) + 1
    assert counters.share_of_block_work == pytest.approx(4 / 6)


def test_the_search_can_stop_between_runs(llama):
    evaluator = llama.evaluator(memory=replace(PLENTY, run_tokens=12, score_tokens=6))

    def stop():
        raise SystemExit(143)

    before = llama.checks
    evaluator.evaluate(llama.candidates(), MINIBATCH)
    assert llama.checks - before > 30
    evaluator.check = stop
    with pytest.raises(SystemExit):
        evaluator.evaluate(llama.candidates(), MINIBATCH)


def make_cache(limit: int, asked: list) -> WeightCache:
    """Every weight has 40 bytes."""

    def load(key):
        asked.append(key[1:])
        return torch.zeros(10)

    return WeightCache(load, lambda key: 40, limit, Counters(), SideStream(CPU))


def test_the_cache_forgets_what_was_unused_for_longest_and_keeps_to_its_limit():
    asked = []
    cache = make_cache(2 * 40, asked)
    for layer, level in ["a0", "a1", "a0", "b2", "a0", "a1"]:
        cache.weight((0, layer, level))
        assert cache.bytes <= 80
    assert asked == [("a", "0"), ("a", "1"), ("b", "2"), ("a", "1")]
    assert cache.counters.peak_weight_bytes == 80


def test_weights_are_fetched_ahead_only_beside_those_in_use():
    asked = []
    cache = make_cache(3 * 40, asked)
    for layer in "abc":
        cache.weight((0, layer, "1"))
    cache.prefetch([(1, layer, "1") for layer in "abc"], in_use=[(0, "b", "1"), (0, "c", "1")])
    assert [key[:2] for key in cache.kept] == [(0, "b"), (0, "c"), (1, "a")]
    cache.prefetch([(1, layer, "1") for layer in "abc"], in_use=[])
    assert [key[:2] for key in cache.kept] == [(1, "a"), (1, "b"), (1, "c")]
    assert len(asked) == 6 and cache.bytes == cache.counters.peak_weight_bytes == 120


def test_plans_group_equal_levels_and_keep_prefixes_apart():
    state_of = np.array([0, 0, 1, 1, 2])
    levels = np.array([[1, 0], [1, 0], [1, 0], [0, 2], [1, 0]], dtype=np.int16)
    plan = plan_block(state_of, levels)
    assert len(plan.parents) == 4 and plan.state_of[0] == plan.state_of[1]
    assert [(group, plan.parents[list(members)].tolist()) for group, members in plan.groups()] == [
        ((0, 2), [1]),
        ((1, 0), [0, 1, 2]),
    ]
    for candidate, state in enumerate(plan.state_of):
        assert plan.parents[state] == state_of[candidate]
        assert (plan.levels[state] == levels[candidate]).all()


def test_slices_are_even_and_cover_everything():
    for total, most in itertools.product((1, 5, 12, 100), (1, 3, 7, 200)):
        slices = even_slices(total, most)
        assert [i for piece in slices for i in range(total)[piece]] == list(range(total))
        sizes = [piece.stop - piece.start for piece in slices]
        assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_memory_is_divided_within_the_budget(llama):
    model = llama.open()
    for gigabytes in (1e-4, 1e-3, 1.0):
        plan = plan_memory(gigabytes, model, LENGTH)
        assert plan.run_tokens >= 1 and plan.score_tokens >= 1
        assert max(block_weights(model)) <= plan.weights
        assert plan.weights + plan.hidden <= gigabytes * 1e9
        assert plan.states(LENGTH, 32, 4) >= 1


def test_too_little_memory_is_refused_with_what_is_needed(llama):
    model = llama.open()
    with pytest.raises(
        ConfigError, match=r"compute.memory_gb: 1e-05 is too little .* needs at least [\de.-]+$"
    ) as error:
        plan_memory(1e-5, model, LENGTH)
    plan_memory(1.01 * float(str(error.value).split()[-1]), model, LENGTH)


@pytest.mark.parametrize("skip", [(), ("down_proj",)])
def test_a_model_larger_than_the_memory_is_searched_within_it(tmp_path, skip):
    fixture = Fixture("llama", tmp_path, skip=skip)
    model = fixture.open()
    size = sum(parameter.numel() for parameter in model.model.parameters()) * 4
    outside = size - sum(block_weights(model))
    budget = outside + 2.2 * max(block_weights(model))
    memory = plan_memory(budget / 1e9, model, LENGTH)
    candidates, counters, plenty = fixture.candidates(9), Counters(), Counters()
    assert budget < size
    judged = fixture.evaluator(memory=memory, counters=counters).evaluate(candidates, MINIBATCH)
    expected = fixture.evaluator(counters=plenty).evaluate(candidates, MINIBATCH)
    np.testing.assert_allclose([j.fitness for j in judged], [j.fitness for j in expected], rtol=1e-5)
    assert 0 < outside + counters.peak_weight_bytes + counters.peak_state_bytes <= budget
    assert counters.peak_weight_bytes <= memory.weights and counters.peak_state_bytes <= memory.hidden
    assert plenty.peak_weight_bytes > memory.weights and plenty.peak_state_bytes > memory.hidden
