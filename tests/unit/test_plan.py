"""The plan against what really happens: artifacts on disk, a search's own counters, counted operations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import CONFIGS, build
from finished_run import make_results, provenance, write_tokens
from large_models import SHAPES
from torch.utils.flop_counter import FlopCounterMode

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table, write_table
from evopress.artifacts.tensors import read_tensors
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.sparsegpt import SparseGpt
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.compute import ComputeSettings
from evopress.config.context import StageContext
from evopress.config.data import PythonDocs
from evopress.config.hessians import HessianSettings
from evopress.config.model import FolderModel, GgufModel, HubModel, PypiModel
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table
from evopress.plan import shape as planning_shape
from evopress.plan.judging import memory_needed
from evopress.plan.run import plan
from evopress.plan.search import SearchWork, search_work
from evopress.plan.shape import ModelShape, shape_from_config, shape_of
from evopress.plan.sharing import Sharing
from evopress.plan.stages import hessian_bytes
from evopress.search.engine.evaluator import model_evaluator
from evopress.search.engine.memory import plan_memory
from evopress.search.engine.objectives import Fitness
from evopress.search.engine.prefixes import plan_block
from evopress.search.evolution.generations import first_state, next_generation
from evopress.search.evolution.initial import even_candidate
from evopress.search.evolution.mutation import make_offspring
from evopress.search.evolution.selection import Step
from evopress.search.settings import EvolutionSettings
from evopress.search.space import Level, Unit, make_space, units_from_variants
from evopress.util.errors import ConfigError
from evopress.workflow.settings import Settings

CPU = torch.device("cpu")
COMPUTE = ComputeSettings(device="cpu")
REPOSITORY = Path(__file__).resolve().parents[2]

# The model's shape


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_from_the_config_is_that_of_the_model(name):
    model = build(name)
    kind, values = CONFIGS[name]
    shape = shape_from_config(getattr(transformers, kind)(**values), torch.float32)
    assert shape.layers.equals(layer_table(model))
    assert shape.inside + shape.outside == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.blocks, shape.hidden_size, shape.vocab_size) == (3, 32, 96)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_operations_are_those_that_torch_counts(name):
    model, ids = build(name), torch.zeros((2, 12), dtype=torch.long)
    kind, values = CONFIGS[name]
    shape = shape_from_config(getattr(transformers, kind)(**values), torch.float32)
    model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    expected = ids.numel() * (shape.blocks * shape.block_flops(12) + shape.head_flops)
    # Rotary embeddings are small matrix products, made once for a sequence, which the plan leaves out.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_folder_needs_nothing_but_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7B"]))
    shape = shape_of(FolderModel(path=str(tmp_path)), Run(tmp_path / "run"))
    assert shape is not None and shape.inside + shape.outside == 6_738_415_616
    assert shape.dtype == torch.bfloat16 and len(shape.layers) == 224
    halved = shape_of(FolderModel(path=str(tmp_path), dtype="float32"), Run(tmp_path / "run"))
    assert halved is not None and halved.bytes == 2 * shape.bytes


def test_what_flatters_a_run_or_does_not_fit_the_model_is_told(tmp_path):
    build("llama").config.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.txt").write_text("the same words")
    text = {"source": "file", "path": str(tmp_path / "mine.txt")}
    positions = build("llama").config.max_position_embeddings

    def planned(held_out):
        data = {"calibration": text, "search": {**text, "sequence_length": 8}, "evaluation": {"held": held_out}}
        model = {"source": "folder", "path": str(tmp_path / "model")}
        return plan(Settings.load({"name": "x", "model": model, "data": data}), Run(tmp_path / "results"))

    told = planned({**text, "sequence_length": positions + 1})
    assert "Warning: data.evaluation.held reads the same text as data.calibration" in told
    assert (
        f"Warning: data.evaluation.held.sequence_length: {positions + 1} tokens are more than the {positions} positions"
        in told
    )
    assert "data.search.sequence_length" not in told
    assert "data.evaluation.held" not in planned({"source": "python_docs", "sequence_length": positions})


def test_of_a_hub_model_only_the_config_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7B"]))
    asked = []
    monkeypatch.setattr(
        planning_shape, "hub_config", lambda settings: asked.append(settings.id) or tmp_path / "config.json"
    )
    found = shape_of(HubModel(id="some/model"), Run(tmp_path / "run"))
    assert found is not None and found.blocks == 32 and asked == ["some/model"]


def test_a_wheel_has_no_shape_until_it_is_prepared(tmp_path):
    settings = PypiModel(package="p", version="1", sha256="0" * 64, file="m.gguf")
    assert shape_of(settings, Run(tmp_path / "run")) is None
    shape = shape_of(settings, make_results(tmp_path))
    assert shape is not None and shape.blocks == 2


def test_a_gguf_file_gives_its_shape(tmp_path):
    from tiny_sources import gguf_file

    path = gguf_file(tmp_path / "model.gguf", build("llama"))
    shape = shape_of(GgufModel(path=str(path)), Run(tmp_path / "run"))
    assert shape is not None and shape.layers.equals(layer_table(build("llama")))
    assert shape.dtype == torch.bfloat16


# Sharing


def _units(blocks: int, rule: str) -> list[Unit]:
    sizes = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 48, "up": 48, "down": 48}
    return [
        Unit(
            f"{block}.{kind}",
            block,
            kind,
            {"size": str(size), "name": kind, "none": "all"}[rule],
            size,
            tuple(Level(str(bits), bits, bits * size, 1) for bits in range(1, 6)),
        )
        for block in range(blocks)
        for kind, size in sizes.items()
    ]


def simulate(units: list[Unit], offspring: int, parent: bool, repetitions: int) -> tuple[float, float]:
    """Share of block work, and layer variants beside the parent's, with the real mutation and the engine's planner."""
    space, rng = make_space(units, 3.0, "test"), np.random.default_rng(0)
    start, blocks = even_candidate(space), units[-1].block + 1
    in_block = [[index for index, unit in enumerate(units) if unit.block == block] for block in range(blocks)]
    states = changed = 0
    for _ in range(repetitions):
        candidates = make_offspring(start, space, offspring, rng)
        rows, places = np.nonzero(candidates != start)
        changed += len(set(zip(places, candidates[rows, places], strict=True)))
        if parent:
            candidates = np.concatenate([start[None], candidates])
        state_of = np.zeros(len(candidates), dtype=np.int64)
        for members in in_block:
            plan = plan_block(state_of, candidates[:, members])
            state_of, states = plan.state_of, states + len(plan.parents)
    return states / repetitions / blocks / (offspring + parent), changed / repetitions


@pytest.mark.parametrize("rule", ["size", "name"])
@pytest.mark.parametrize(
    ("blocks", "offspring", "parent"),
    [(30, 16, False), (32, 128, False), (32, 16, False), (30, 8, True), (4, 16, False)],
)
def test_the_expected_sharing_is_that_of_simulated_generations(rule, blocks, offspring, parent):
    units = _units(blocks, rule)
    sharing = Sharing.of([unit.block for unit in units], [unit.group for unit in units], blocks)
    share, changed = simulate(units, offspring, parent, 1500 // offspring)
    # The mean over some 1,500 offspring scatters by about a hundredth; what the formula leaves out is as small.
    assert sharing.share(offspring, parent=parent) == pytest.approx(share, abs=0.03)
    assert sharing.changed(offspring) == pytest.approx(changed, rel=0.06)


def test_trades_of_unlike_layers_share_less_than_expected():
    units = _units(30, "none")
    sharing = Sharing.of([unit.block for unit in units], [unit.group for unit in units], 30)
    assert sharing.share(16, parent=False) < simulate(units, 16, False, 60)[0]


def test_the_share_with_many_blocks_is_the_integral():
    blocks = 4000
    sharing = Sharing.of(range(blocks), ["all"] * blocks, blocks)
    expected = 1 - 5 / 27 - 3 / 45 - 1 / 63
    assert sharing.share(1, parent=False) == pytest.approx(1.0)
    assert sharing.share(100, parent=True) == pytest.approx(expected, abs=0.01)


# Disk


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Run:
    """A tiny model with real Hessians and variants."""
    run = make_results(tmp_path_factory.mktemp("plan"))
    write_tokens(run, "calibration", sequences=6)
    model = BlockwiseModel.from_folder(run.model, CPU)
    write_table(layer_table(model.model), run.layers, LAYERS, provenance())
    accumulate_hessians(StageContext(run, COMPUTE), HessianSettings(), 0)
    return run


@pytest.fixture(scope="module")
def shape(made) -> ModelShape:
    shape = shape_of(FolderModel(path=str(made.model)), made)
    assert shape is not None
    return shape


def test_bytes_of_the_hessians_are_exact(made, shape):
    tensors = [tensor for block in range(2) for tensor in read_tensors(made.hessian(block)).values()]
    assert hessian_bytes(shape.layers) == sum(tensor.nbytes for tensor in tensors)
    assert hessian_bytes(read_table(made.layers, LAYERS)) == hessian_bytes(shape.layers)


@pytest.mark.parametrize(
    "settings",
    [
        Gptq(bits=(2, 3, 5, 8), group_size=8),
        Gptq(bits=(3,), group_size=None, symmetric=True, exclude=("*.down_proj",)),
        SparseGpt(sparsity=0.5, step=40, levels=3),
        SparseGpt(patterns=("2:4", "1:4")),
    ],
    ids=str,
)
def test_bytes_of_the_variants_are_exact(made, shape, settings):
    for block in range(2):
        make_variants(StageContext(made, COMPUTE), "v", settings, block)
    planned = settings.table(shape.layers, shape.itemsize, "variants.v")
    by = ["block", "layer", "level"]
    stored = VariantStore(made, "v").table
    for column in ("name", "value", "cost", "parameters", "bytes"):
        expected = stored.sort_values(by)[column].tolist()
        assert planned.sort_values(by)[column].tolist() == expected, column


def test_group_sizes_that_do_not_fit_are_found_before_anything_runs(shape):
    with pytest.raises(ConfigError, match=r"variants\.v: model\.layers\.0\.\S+: .*7"):
        Gptq(group_size=7).table(shape.layers, shape.itemsize, "variants.v")


# A real search

LENGTH, SEQUENCES, BLOCKS = 16, 60, 8
SEARCH = EvolutionSettings(
    variants="gptq", target=3.0, generations=8, offspring=24, survivors=(6, 2, 1), tokens=(16, 56, 128)
)


class Tiny:
    """A model of eight blocks that is searched with made-up weights, and its plan."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
        self.folder = folder
        self.shape = shape_from_config(config, torch.float32)
        self.variants = Gptq(bits=(2, 3, 4, 5), group_size=16).table(
            self.shape.layers, self.shape.itemsize, "variants.gptq"
        )
        self.tokens = torch.randint(64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))

    def plan(self, memory_gb: float) -> SearchWork:
        text = PythonDocs(tokens=SEQUENCES * LENGTH, sequence_length=LENGTH)
        return search_work(self.shape, self.variants, SEARCH, text, memory_gb, "cpu", "searches.q")

    def search(self, memory_gb: float, generations: int):
        """Counters of a real search."""
        space = make_space(units_from_variants(self.variants, SEARCH.group_rule), SEARCH.target, "searches.q")
        model = BlockwiseModel.from_folder(self.folder, CPU, resident=False)
        dense = BlockwiseModel.from_folder(self.folder, CPU)

        def unpack(block: int, layer: str, level: str) -> torch.Tensor:
            weight = dense.blocks[block].get_submodule(layer).weight
            scale = 0.02 * (6 - int(level))
            return weight + scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(block))

        compute = ComputeSettings(device="cpu", memory_gb=memory_gb)
        evaluator = model_evaluator(
            model, space, unpack, self.tokens, Fitness("kl"), compute, "searches.q", lambda: None
        )
        rng = np.random.default_rng(1)
        state, _ = first_state(space, SEARCH.initial_candidates, SEARCH.initial_tokens, evaluator, rng)
        steps = [Step(kept, tokens) for kept, tokens in zip(SEARCH.survivors, SEARCH.tokens, strict=True)]
        for _ in range(generations):
            state, _ = next_generation(state, space, SEARCH.offspring, steps, evaluator, rng)
        return evaluator.counters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_a_search_does_the_work_that_was_planned(tiny):
    planned, counters = tiny.plan(1.0), tiny.search(1.0, SEARCH.generations)
    assert counters.candidate_tokens == SEARCH.generations * planned.candidate_tokens
    assert counters.head_tokens == SEARCH.generations * planned.head_tokens
    assert counters.block_tokens_alone == SEARCH.generations * planned.block_tokens_alone
    assert counters.block_tokens == pytest.approx(SEARCH.generations * planned.block_tokens, rel=0.06)


def test_weights_that_fit_are_unpacked_once(tiny):
    planned, counters = tiny.plan(1.0), tiny.search(1.0, 1)
    assert planned.kept and planned.start_unpacked_bytes == tiny.shape.layers["parameters"].sum() * 4
    assert counters.unpacked_bytes == pytest.approx(planned.start_unpacked_bytes + planned.unpacked_bytes, rel=0.1)


def test_weights_that_do_not_fit_are_unpacked_in_every_pass(tiny):
    weights = 4 * tiny.shape.block_bytes  # of eight blocks; half as much is left for hidden states
    memory_gb = (tiny.shape.outside * 4 + 2 * weights) / 1e9
    planned, counters = tiny.plan(memory_gb), tiny.search(memory_gb, SEARCH.generations)
    assert not planned.kept and planned.steps[-1].passes > 1
    assert counters.unpacked_bytes == pytest.approx(SEARCH.generations * planned.unpacked_bytes, rel=0.1)


def test_a_random_start_and_the_dense_model_are_counted_before_the_first_generation(tiny):
    text = PythonDocs(tokens=SEQUENCES * LENGTH, sequence_length=LENGTH)
    settings = SEARCH.model_copy(update={"target": 2.5, "initial_candidates": 10, "initial_tokens": 32})
    work = search_work(tiny.shape, tiny.variants, settings, text, 1.0, "cpu", "searches.q")
    block = tiny.shape.blocks * tiny.shape.block_flops(LENGTH)
    assert work.start_flops == (960 + 320) * block + 320 * tiny.shape.head_flops
    assert tiny.plan(1.0).start_flops == 960 * block


def test_a_start_from_sensitivities_is_counted(tiny):
    text = PythonDocs(tokens=SEQUENCES * LENGTH, sequence_length=LENGTH)
    start = {"start": "sensitivity", "sensitivity_tokens": 32, "initial_tokens": 64}
    settings = SEARCH.model_copy(update=start)
    work = search_work(tiny.shape, tiny.variants, settings, text, 1.0, "cpu", "searches.q")
    layers = tiny.variants["name"].nunique()
    judged = (layers + 1) * 32 + 3 * 64  # then the even start, and one by fitness and by hidden states
    block = tiny.shape.blocks * tiny.shape.block_flops(LENGTH)
    assert work.start_flops == (960 + judged) * block + judged * tiny.shape.head_flops


def test_the_least_budget_is_the_one_that_a_search_refuses_to_go_below(tiny):
    needed, model = memory_needed(tiny.shape, LENGTH), BlockwiseModel.from_folder(tiny.folder, CPU, resident=False)
    with pytest.raises(ConfigError, match="memory_gb"):
        plan_memory((needed - 16) / 1e9, model, LENGTH)
    plan_memory((needed + 16) / 1e9, model, LENGTH)
