"""The strategies beside evolution on a tiny model: what they measure against the plain model, budgets and restarts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CONFIGS, build, save, tokens
from depth_run import without
from finished_run import BLOCKS, LAYERS
from search_run import COMPUTE, artifacts, fresh, prepare
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, VARIANTS, read_table
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockwiseModel
from evopress.search.base import Strategy
from evopress.search.engine.block_scores import SCORES, block_scores
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.run import run_search
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.search.strategies.scores import BlockScores, least, least_window
from evopress.util import metrics
from evopress.util.errors import ConfigError

RANDOM = RandomSearch(
    variants="gptq", target=2.7, generations=4, offspring=5, survivors=(2, 1), tokens=(18, 48), seed=3
)
GREEDY = Greedy(variants="gptq", target=2.7, tokens=24, per_round=4, group_rule="none")
DP = DynamicProgramming(variants="gptq", target=2.7)
WHOLE = 72
"""All tokens of the search text."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    results = prepare(tmp_path_factory.mktemp("baselines"))
    make_module_table(StageContext(results), "depth", Drop())
    make_module_table(StageContext(results), "blocks", Drop(unit="block"))
    make_module_table(StageContext(results), "late", Drop(exclude=("*.0.attn",)))
    return results


@pytest.fixture
def results(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


@pytest.fixture(scope="module")
def plain(prepared: Run) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(prepared.model).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [RANDOM, GREEDY, DP, DP.model_copy(update={"errors": "propagated", "tokens": 24})],
    ids=["random", "greedy", "dp", "dp-propagated"],
)
def test_the_budget_holds_and_effort_is_told(results: Run, settings: Strategy) -> None:
    run_search(StageContext(results, COMPUTE), "s", settings)
    made = read_table(results.configuration("s"), CONFIGURATION)
    assert len(made) == BLOCKS * len(LAYERS)
    assert 2.55 < made["cost"].sum() / made["parameters"].sum() <= 2.7
    effort, trace = read_table(results.effort("s"), EFFORT), read_table(results.trace("s"), TRACE)
    assert len(effort) == 1 and effort["seconds"][0] > 0
    assert effort["tokens"][0] == trace["tokens"].sum()
    assert not results.resume("s").exists()


def test_dp_has_the_least_summed_error_of_all_that_was_tried(results: Run) -> None:
    run_search(StageContext(results, COMPUTE), "dp", DP)
    run_search(StageContext(results, COMPUTE), "random", RANDOM.model_copy(update={"group_rule": "none"}))
    errors = VariantStore(results, "gptq").table.set_index(["name", "level"])["error"]
    sums = {}
    for name in ("dp", "random"):
        made = read_table(results.configuration(name), CONFIGURATION)
        sums[name] = errors.loc[list(zip(made["unit"], made["level"], strict=True))].sum()
    assert sums["dp"] < sums["random"]


def test_propagated_errors_are_those_of_one_layer_alone(results: Run, plain: PreTrainedModel) -> None:
    settings = DP.model_copy(update={"errors": "propagated", "tokens": WHOLE})
    run_search(StageContext(results, COMPUTE), "dp", settings)
    ids, store = read_tokens(results, "search"), VariantStore(results, "gptq")
    dense = last_hidden(plain, ids)
    expected = []
    for block in range(BLOCKS):
        table = read_table(results.variant_table("gptq", block), VARIANTS)
        for row in table.sort_values("cost", kind="stable").itertuples():
            weight = store.weight(block, row.layer, row.level, torch.device("cpu"), torch.float32)
            with replaced(plain.get_submodule(row.name).weight, weight):
                hidden = last_hidden(plain, ids)
            error = ((hidden - dense).square().sum(-1) / dense.square().sum(-1)).mean()
            expected.append((row.name, row.cost, float(error)))
    trace = read_table(results.trace("dp"), TRACE)
    found = trace.loc[trace["candidate"] >= 0, "fitness"].tolist()
    order = {name: number for number, name in enumerate(dict.fromkeys(store.table["name"]))}
    expected.sort(key=lambda entry: (order[entry[0]], entry[1]))
    np.testing.assert_allclose(found, [error for _, _, error in expected], rtol=1e-4, atol=1e-9)


def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the last block returns, before the final norm."""
    return block_states(model, ids)[-1]


def block_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Hidden states before the first block and after each."""
    inner = getattr(model.model, "decoder", model.model)
    states: list[Tensor] = []

    def before(_, args, kwargs):
        if not states:
            states.append(args[0] if args else kwargs["hidden_states"])

    def after(_, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [inner.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in inner.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    return states


@contextmanager
def replaced(parameter: Tensor, weight: Tensor) -> Iterator[None]:
    before = parameter.clone()
    parameter.copy_(weight)
    yield
    parameter.copy_(before)


# --- death and restart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [RANDOM, GREEDY.model_copy(update={"per_round": 1})], ids=["random", "greedy"])
def test_killed_and_restarted_it_ends_with_the_same_bytes(
    results: Run, settings: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh(results, "whole")
    run_search(StageContext(whole, COMPUTE), "q", settings)
    evaluate = ModelEvaluator.evaluate
    for last in (3, 1, 2):
        calls = iter(range(last))

        def dying(*args, calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ModelEvaluator, "evaluate", dying)
            run_search(StageContext(results, COMPUTE), "q", settings)
    run_search(StageContext(results, COMPUTE), "q", settings)
    assert artifacts(results) == artifacts(whole)
    spent = [read_table(run.effort("q"), EFFORT)["tokens"][0] for run in (results, whole)]
    assert spent[0] == spent[1]


# --- depth ---------------------------------------------------------------------------------------------------------

BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda x, y: 1 - (x * y).sum(-1) / x.square().sum(-1).sqrt() / y.square().sum(-1).sqrt(),
    "window_cosine": lambda x, y: (
        torch.acos((x / x.norm(dim=-1, keepdim=True) * (y / y.norm(dim=-1, keepdim=True))).sum(-1)) / torch.pi
    ),
    "window_mean_cosine": lambda x, y: (
        1 - (x / x.norm(dim=-1, keepdim=True) * (y / y.norm(dim=-1, keepdim=True))).sum(-1)
    ),
    "norm_ratio": lambda x, y: ((y - x).square().sum(-1) / y.square().sum(-1)).sqrt(),
    "l2": lambda x, y: (y - x).square().sum(-1).sqrt(),
    "l2_normalized": lambda x, y: (
        (y / y.square().sum(-1, keepdim=True).sqrt() - x / x.square().sum(-1, keepdim=True).sqrt())
        .square()
        .sum(-1)
        .sqrt()
    ),
    "normalized_l2": lambda x, y: ((y - x).square().sum(-1) / x.square().sum(-1)).sqrt(),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("name", "window"), [("llama", 1), ("llama", 2), ("llama", 3), ("gemma2", 2), ("opt", 1)])
def test_scores_compare_the_states_around_blocks(tmp_path: Path, score: str, name: str, window: int) -> None:
    assert name in CONFIGS
    model, ids = build(name), tokens(count=4)
    states = [state.double() for state in block_states(model, ids)]
    expected = [float(BY_HAND[score](states[i], states[i + window]).mean()) for i in range(4 - window)]
    blockwise = BlockwiseModel.from_folder(save(model, tmp_path), torch.device("cpu"), resident=False)
    for run_tokens in (1, 4096):
        found = block_scores(blockwise, ids, SCORES[score], window, run_tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("score", [*SCORES, "perplexity", "kl"])
def test_the_block_of_least_score_is_dropped(results: Run, plain: PreTrainedModel, score: str) -> None:
    ids = read_tokens(results, "search")
    if score in SCORES:
        states = block_states(plain, ids)
        expected = [float(BY_HAND[score](states[i], states[i + 1]).mean()) for i in range(BLOCKS)]
    else:
        expected = [alone(plain, ids, block, score) for block in range(BLOCKS)]
    for variants in ("depth", "blocks"):
        settings = BlockScores(variants=variants, target=1, score=score, tokens=WHOLE)
        run_search(StageContext(results, COMPUTE), variants, settings)
        made = read_table(results.configuration(variants), CONFIGURATION)
        assert set(made.loc[made["level"] == "drop", "block"]) == {int(np.argmin(expected))}
        assert made["level"].tolist().count("drop") == 2
        if score not in SCORES:
            trace = read_table(results.trace(variants), TRACE)
            np.testing.assert_allclose(trace["fitness"], expected, rtol=1e-4)
        assert read_table(results.effort(variants), EFFORT)["tokens"][0] == WHOLE * (1 if score in SCORES else BLOCKS)


def alone(model: PreTrainedModel, ids: Tensor, block: int, score: str) -> float:
    """Perplexity (its logarithm) without a block, or divergence from the whole model."""
    dense = model(ids).logits
    with without(model, [(block, "attn"), (block, "mlp")]):
        logits = model(ids).logits
    if score == "kl":
        return float(metrics.kl_divergence(metrics.distribution(dense.flatten(0, 1)), logits.flatten(0, 1)).mean())
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_blocks_that_may_not_go_as_a_whole_stay(results: Run) -> None:
    settings = BlockScores(variants="late", target=1, score="l2", tokens=WHOLE)
    run_search(StageContext(results, COMPUTE), "s", settings)
    made = read_table(results.configuration("s"), CONFIGURATION)
    assert made.loc[made["level"] == "drop", "unit"].tolist() == ["model.layers.1.attn", "model.layers.1.mlp"]


def test_ties_and_windows() -> None:
    assert least({0: 2.0, 1: 1.0, 2: 1.0, 3: 5.0}, 2) == [2, 1]
    values = np.array([1.0, 3.0, 2.0, 4.0])
    assert least_window(values, [0, 1, 2, 3, 4], 2, "x") == [0, 1]
    assert least_window(values, [1, 2, 3, 4], 2, "x") == [2, 3]
    with pytest.raises(ConfigError, match="x: there are no 2 consecutive blocks"):
        least_window(values, [0, 2, 4], 2, "x")


def test_brute_force_keeps_the_best_block_set(results: Run, plain: PreTrainedModel) -> None:
    run_search(StageContext(results, COMPUTE), "b", BruteForce(variants="blocks", target=1, tokens=WHOLE))
    expected = [alone(plain, read_tokens(results, "search"), block, "kl") for block in range(BLOCKS)]
    trace = read_table(results.trace("b"), TRACE)
    np.testing.assert_allclose(trace["fitness"], expected, rtol=1e-4)
    made = read_table(results.configuration("b"), CONFIGURATION)
    assert set(made.loc[made["level"] == "drop", "block"]) == {int(np.argmin(expected))}


@pytest.mark.parametrize(
    "settings",
    [
        Greedy(variants="depth", target=1, tokens=WHOLE),
        RANDOM.model_copy(update={"variants": "depth", "target": 1}),
        DynamicProgramming(variants="depth", target=1, errors="propagated", tokens=WHOLE, group_rule="size"),
    ],
    ids=["greedy", "random", "dp"],
)
def test_the_others_drop_modules_too(results: Run, settings: Strategy) -> None:
    run_search(StageContext(results, COMPUTE), "s", settings)
    made = read_table(results.configuration("s"), CONFIGURATION)
    assert made[made["level"] == "drop"].groupby("layer").size().to_dict() == {"attn": 1, "mlp": 1}


def test_greedy_removes_the_module_whose_loss_hurts_least_first(results: Run, plain: PreTrainedModel) -> None:
    run_search(StageContext(results, COMPUTE), "g", Greedy(variants="depth", target=1, tokens=WHOLE))
    trace = read_table(results.trace("g"), TRACE)
    first = trace[trace["generation"] == 1]
    ids, expected = read_tokens(results, "search"), [0.0]
    dense = metrics.distribution(plain(ids).logits.flatten(0, 1))
    for module in [(block, kind) for block in range(BLOCKS) for kind in ("attn", "mlp")]:
        with without(plain, [module]):
            expected.append(float(metrics.kl_divergence(dense, plain(ids).logits.flatten(0, 1)).mean()))
    np.testing.assert_allclose(first["fitness"], expected, rtol=1e-4, atol=1e-6)
    assert first.loc[first["accepted"], "candidate"].tolist() == [int(np.argmin(expected[1:]))]
