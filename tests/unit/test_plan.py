"""The plan against what really happens: artifacts on disk, a search's own counters, counted operations."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import CONFIGS, build
from finished_run import make_results, provenance, write_tokens
from large_models import SHAPES
from torch.utils.flop_counter import FlopCounterMode

from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.tables import LAYERS, read_table, write_table
from evopress.artifacts.tensors import read_tensors
from evopress.compression.hessian import accumulate_hessians
from evopress.compression.methods.gptq import Gptq
from evopress.compression.methods.pruning import SparseGpt
from evopress.compression.stage import make_variants
from evopress.compression.store import VariantStore
from evopress.config.context import ComputeSettings, StageContext
from evopress.config.data import HessianSettings, PythonDocs
from evopress.config.model import FolderModel, GgufModel, HubModel, PypiModel
from evopress.models import config_file
from evopress.models.blockwise import BlockwiseModel
from evopress.models.modules import HEAD, OUTER
from evopress.models.structure import layer_table
from evopress.plan.searches import SearchWork, requests_of, search_work
from evopress.plan.shape import ModelShape, shape_from_config, shape_of
from evopress.plan.stages import hessian_bytes
from evopress.plan.text import describe_model, plan
from evopress.search.engine.evaluator import model_evaluator
from evopress.search.engine.memory import least_memory, packed_limit, plan_memory
from evopress.search.problem import problem_of
from evopress.search.rounds import Rehearsal
from evopress.search.sensitivity import single_effects
from evopress.search.strategies.evolution import Evolution
from evopress.util.errors import ConfigError
from evopress.util.text import amount
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
    assert (len(shape.blocks), shape.hidden_size, shape.vocab_size) == (3, 32, 96)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_operations_are_those_that_torch_counts(name):
    model, ids = build(name), torch.zeros((2, 12), dtype=torch.long)
    kind, values = CONFIGS[name]
    shape = shape_from_config(getattr(transformers, kind)(**values), torch.float32)
    model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    expected = ids.numel() * (len(shape.blocks) * shape.block_flops(12) + shape.head_flops)
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


def test_files_in_the_runtime_have_their_row(tmp_path):
    build("llama").config.save_pretrained(tmp_path / "model")
    text = {"source": "python_docs", "tokens": 512, "sequence_length": 16}
    search = {"strategy": "uniform", "variants": "v", "target": 3}
    settings = {
        "name": "x",
        "model": {"source": "folder", "path": str(tmp_path / "model")},
        "data": {"calibration": text, "search": text, "evaluation": {"held": text}},
        "variants": {"v": {"method": "gptq", "bits": [3], "group_size": 8}},
        "searches": {"a": {**search, "exports": [{"exporter": "gguf", "dequantize": True}]}, "b": search},
    }

    def row(**evaluation):
        lines = plan(Settings.load({**settings, "evaluation": evaluation}), Run(tmp_path / "results")).splitlines()
        return [line.split() for line in lines if line.startswith("runtime ")]

    assert row() == []
    ((_, jobs, *sizes),) = row(runtime={"tokens": 128})
    assert jobs == "2" and "256" in sizes  # the file of `a` and the dense model's, 128 tokens each


def test_a_size_is_compared_with_that_of_the_source(tmp_path):
    from tiny_sources import gguf_file

    path = gguf_file(tmp_path / "model.gguf", build("llama"))
    text = {"source": "python_docs", "tokens": 512, "sequence_length": 16}

    def planned(size):
        settings = {
            "name": "x",
            "model": {"source": "gguf", "path": str(path)},
            "data": {"calibration": text, "search": text, "evaluation": {"held": text}},
            "variants": {"v": {"method": "gptq", "bits": [3, 4], "group_size": 8}},
            "searches": {"a": {"strategy": "uniform", "variants": "v", "target": {"bytes": size}}},
        }
        return plan(Settings.load(settings), Run(tmp_path / "results"))

    shape, source = shape_of(GgufModel(path=str(path)), Run(tmp_path / "results")), path.stat().st_size
    assert shape is not None and shape.source == source
    assert describe_model(shape).endswith(f" in bfloat16, from a quantized file of {amount(source, 'B')}")
    with pytest.raises(ConfigError, match=r"searches\.a\.target: .* is not below the quantized file"):
        planned(source)
    with pytest.raises(ConfigError, match="is above the largest file"):  # the source is float32
        planned(source - 1)


def test_of_a_hub_model_only_the_config_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["7B"]))
    asked = []
    monkeypatch.setattr(
        config_file, "hub_config", lambda settings: asked.append(settings.id) or tmp_path / "config.json"
    )
    found = shape_of(HubModel(id="some/model"), Run(tmp_path / "run"))
    assert found is not None and len(found.blocks) == 32 and asked == ["some/model"]


def test_a_wheel_has_no_shape_until_it_is_prepared(tmp_path):
    settings = PypiModel(package="p", version="1", sha256="0" * 64, file="m.gguf")
    assert shape_of(settings, Run(tmp_path / "run")) is None
    shape = shape_of(settings, make_results(tmp_path))
    assert shape is not None and len(shape.blocks) == 2


def test_a_gguf_file_gives_its_shape(tmp_path):
    from tiny_sources import gguf_file

    path = gguf_file(tmp_path / "model.gguf", build("llama"))
    shape = shape_of(GgufModel(path=str(path)), Run(tmp_path / "run"))
    assert shape is not None and shape.layers.equals(layer_table(build("llama")))
    assert shape.dtype == torch.bfloat16


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
        make_variants(StageContext(made, COMPUTE), "v", settings, [block])
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
SEARCH = Evolution(variants="gptq", target=3.0, generations=8, offspring=24, survivors=(6, 2, 1), tokens=(16, 56, 128))


class Tiny:
    """A model of eight blocks that is searched with made-up weights, and its plan."""

    def __init__(self, folder: Path, vocabulary: int = 64, *, embedding: bool = False) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
        self.folder = folder
        self.shape = shape_from_config(config, torch.float32).on("cpu")
        method = Gptq(bits=(2, 3, 4, 5), group_size=16, embedding=embedding)
        self.variants = self.shape.table(method, "variants.gptq")
        self.tokens = torch.randint(64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))

    def problem(self, settings: Evolution):
        return problem_of({"gptq": self.variants}, settings.constraints("searches.q"))

    def plan(self, memory_gb: float, settings: Evolution = SEARCH) -> SearchWork:
        text = PythonDocs(tokens=SEQUENCES * LENGTH, sequence_length=LENGTH)
        problem = self.problem(settings)
        compute = ComputeSettings(device="cpu", memory_gb=memory_gb)
        return search_work(self.shape, problem, settings, requests_of(settings, problem), text, compute)

    def search(self, memory_gb: float, settings: Evolution = SEARCH):
        """Counters of a real search."""
        problem = self.problem(settings)
        model = BlockwiseModel.from_folder(self.folder, CPU, resident=False)
        dense = BlockwiseModel.from_folder(self.folder, CPU)

        def unpack(block: int, layer: str, level: str) -> torch.Tensor:
            outer = {EMBEDDING: dense.model.get_input_embeddings(), HEAD: dense.model.get_output_embeddings()}
            weight = (outer[layer] if layer in outer else dense.blocks[block].get_submodule(layer)).weight
            scale = 0.02 * (6 - int(level))
            return weight + scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(max(0, block)))

        fitness = settings.minimizes()
        evaluator = model_evaluator(
            model, problem.space, unpack, self.tokens, fitness, memory_gb, "searches.q", lambda: None
        )
        rng = np.random.default_rng(1)
        if (asked := settings.effects()) is not None:  # measured before, as far as this search knows
            effects = single_effects(problem.space, 1, Rehearsal(rng), rng, asked.each)
            problem = replace(problem, effects=effects)
        state, _ = settings.first_round(problem, evaluator, rng)
        while settings.remaining(state, problem):
            state, _ = settings.next_round(state, problem, evaluator, rng)
        return evaluator.counters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"switches": 1},
        {"switches": 6},
        {"population": 4, "survivors": (12, 6, 4)},
        {"fitness": "perplexity", "group_rule": "none"},
        {"target": 2.5, "initial_candidates": 10, "initial_tokens": 32},
        {"start": "sensitivity", "sensitivity_tokens": 32, "initial_tokens": 64},
        {"start": "sensitivity", "sensitivity_levels": 2, "sensitivity_tokens": 32, "initial_tokens": 64},
    ],
    ids=str,
)
def test_a_search_does_the_work_that_was_planned(tiny, changes):
    settings = SEARCH.model_copy(update=changes)
    planned, counters = tiny.plan(1.0, settings), tiny.search(1.0, settings)
    whole = planned.whole
    assert planned.rounds == pytest.approx(settings.generations)
    assert counters.candidate_tokens == pytest.approx(whole.candidate_tokens)
    assert counters.head_tokens == pytest.approx(whole.head_tokens)
    assert counters.block_tokens_alone == pytest.approx(whole.block_tokens_alone)
    assert counters.block_tokens == pytest.approx(whole.block_tokens, rel=0.1)
    assert counters.peak_state_bytes == pytest.approx(whole.peak_state_bytes, rel=0.1)
    tokens = SEQUENCES * LENGTH * BLOCKS * (settings.fitness != "perplexity") + counters.block_tokens
    flops = tokens * tiny.shape.block_flops(LENGTH) + counters.head_tokens * tiny.shape.head_flops
    assert flops == pytest.approx(whole.flops, rel=0.1)


def test_more_switches_share_less(tiny):
    one, three, six = (
        tiny.plan(1.0, SEARCH.model_copy(update={"switches": number})).a_round.share_of_block_work
        for number in (1, 3, 6)
    )
    assert one < three < six <= 1


def test_a_search_that_depends_on_others_is_planned_without_them(tiny):
    apart, together = (
        tiny.plan(1.0, SEARCH.model_copy(update={"start_from": names, "initial_tokens": 32})) for names in ((), ("a",))
    )
    assert apart.before.candidate_tokens == 0 and together.before.candidate_tokens == 2 * 32


def test_weights_that_fit_are_unpacked_once(tiny):
    one = SEARCH.model_copy(update={"generations": 1})
    planned, counters = tiny.plan(1.0, one), tiny.search(1.0, one)
    assert planned.kept and planned.whole.unpacked_bytes > tiny.shape.layers["parameters"].sum() * 4
    assert counters.unpacked_bytes == pytest.approx(planned.whole.unpacked_bytes, rel=0.1)


def test_weights_that_do_not_fit_are_unpacked_in_every_pass(tiny):
    weights = 4 * tiny.shape.block_bytes  # of eight blocks; half as much is left for hidden states
    memory_gb = (tiny.shape.outside * 4 + 2 * weights) / 1e9
    planned, counters = tiny.plan(memory_gb), tiny.search(memory_gb)
    assert not planned.kept and planned.a_round.passes > len(SEARCH.tokens)
    assert counters.unpacked_bytes == pytest.approx(planned.whole.unpacked_bytes, rel=0.1)
    assert counters.peak_state_bytes <= memory_gb * 1e9 / 4


def test_the_least_budget_is_the_one_that_a_search_refuses_to_go_below(tiny):
    model = BlockwiseModel.from_folder(tiny.folder, CPU, resident=False)
    needed = least_memory(model, LENGTH)
    for asked in (lambda memory_gb: plan_memory(memory_gb, model, LENGTH), tiny.plan):
        with pytest.raises(ConfigError, match="memory_gb"):
            asked((needed - 16) / 1e9)
        asked((needed + 16) / 1e9)


def test_a_vocabulary_with_levels_that_outweighs_a_block_is_part_of_the_least_budget(tmp_path):
    large = Tiny(tmp_path / "model", vocabulary=4096, embedding=True)
    once = SEARCH.model_copy(update={"generations": 1, "offspring": 4, "survivors": (1,), "tokens": (16,)})
    units = large.problem(once).space.units
    matrix = 4096 * 32 * 4
    model = BlockwiseModel.from_folder(large.folder, CPU, resident=False)
    needed, blocks_alone = least_memory(model, LENGTH, units), least_memory(model, LENGTH)
    assert needed - blocks_alone > matrix > 2 * large.shape.block_bytes
    for asked in (large.search, large.plan):
        with pytest.raises(ConfigError, match="too little for the embedding or head at one level") as told:
            asked((needed - 16) / 1e9, once)
        assert float(str(told.value).split()[-1]) == pytest.approx(needed / 1e9, rel=0.01)
    large.plan((needed + 16) / 1e9, once)
    counters = large.search((needed + 16) / 1e9, once)
    assert matrix <= counters.peak_weight_bytes <= matrix + 16
    inside = tuple(unit for unit in units if unit.layer not in OUTER)
    for of_blocks in ((), inside):  # where embedding and head stay dense, nothing is asked for them
        plan_memory((blocks_alone + 16) / 1e9, model, LENGTH, of_blocks)


@pytest.mark.parametrize("gigabytes", [0.0025, 0.004])
def test_packed_weights_leave_room_for_an_embedding(tmp_path, gigabytes):
    large = Tiny(tmp_path / "model", vocabulary=4096, embedding=True)
    model = BlockwiseModel.from_folder(large.folder, CPU, resident=False)
    units = large.problem(SEARCH).space.units
    plan = plan_memory(gigabytes, model, LENGTH, units)
    room, without = packed_limit(gigabytes, plan, model, units), packed_limit(gigabytes, plan, model)
    assert plan.weights - room == max(4096 * 32 * 4, plan.weights - without)
