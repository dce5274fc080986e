"""Depth pruning: what may be dropped, the space of it, and its fitness against the Hugging Face model with hooks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import CONFIGS, OUTPUT_LAYERS, build, save, tokens
from finished_run import provenance
from search_run import COMPUTE, fresh, prepare, search_with_effects

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, EFFECTS, LAYERS, read_table, write_table
from evopress.artifacts.tables import MODULES as SCHEMA
from evopress.compression.base import Level, Unit
from evopress.compression.families import MODULES
from evopress.compression.methods.drop import Drop, make_module_table
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.models.structure import layer_table, linear_layers
from evopress.search.candidates import initial_candidates, make_offspring
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.engine.memory import MemoryPlan
from evopress.search.engine.objectives import make_objective
from evopress.search.engine.weights import Counters, VariantBlocks
from evopress.search.evaluation import Minibatch
from evopress.search.run import run_search
from evopress.search.space import DENSE_LEVEL, make_space
from evopress.search.strategies.evolution import Evolution
from evopress.util import metrics
from evopress.util.errors import ConfigError

PLENTY = MemoryPlan(weights=1 << 30, hidden=1 << 30, run_tokens=4096, score_tokens=4096)
SCARCE = MemoryPlan(weights=1 << 14, hidden=1 << 14, run_tokens=16, score_tokens=16)
MINIBATCH = Minibatch((0, 2, 1), (12, 12, 12))
SEARCH = Evolution(
    variants="depth",
    target=1,
    generations=4,
    offspring=4,
    survivors=(2, 1),
    tokens=(18, 48),
    initial_candidates=3,
    initial_tokens=12,
)


def layers(blocks: int = 4) -> pd.DataFrame:
    """Layers of a model with two in each module, as the layer table has them."""
    kinds = {
        "self_attn.q_proj": ("attn", 6),
        "self_attn.o_proj": ("attn", 4),
        "mlp.up": ("mlp", 9),
        "mlp.down": ("mlp", 9),
    }
    rows = [
        (block, layer, f"model.layers.{block}.{layer}", module, parameters, 2 * parameters)
        for block in range(blocks)
        for layer, (module, parameters) in kinds.items()
    ]
    return pd.DataFrame(rows, columns=["block", "layer", "name", "module", "parameters", "bytes"])


def table(blocks: int = 4, **settings: object) -> pd.DataFrame:
    return Drop(**settings).module_table(layers(blocks), "variants.depth")  # type: ignore[arg-type]


def test_the_module_table_lists_what_may_be_dropped() -> None:
    made = table(2)
    assert made["name"].tolist() == [f"model.layers.{block}.{kind}" for block in range(2) for kind in ("attn", "mlp")]
    assert made["unit"].tolist() == made["name"].tolist()
    assert made["parameters"].tolist() == [10, 18, 10, 18] and made["bytes"].tolist() == [20, 36, 20, 36]
    assert list(made.columns) == SCHEMA.names
    assert table(2, unit="block")["unit"].tolist() == ["model.layers.0"] * 2 + ["model.layers.1"] * 2


def test_pairs_are_of_neighbours_and_an_odd_block_stays() -> None:
    made = table(5, unit="pair")
    assert made["unit"].unique().tolist() == ["model.layers.0-1", "model.layers.2-3"]
    assert made.groupby("unit")["block"].unique().map(list).tolist() == [[0, 1], [2, 3]]


def test_an_excluded_module_keeps_its_whole_unit() -> None:
    assert set(table(exclude=["*.0.attn", "*.mlp"])["name"]) == {f"model.layers.{block}.attn" for block in (1, 2, 3)}
    assert table(unit="pair", exclude=["*.1.mlp"])["unit"].unique().tolist() == ["model.layers.2-3"]
    with pytest.raises(ConfigError, match=r"variants.depth.exclude: '\*.9.attn' matches no module"):
        table(exclude=["*.9.attn"])
    with pytest.raises(ConfigError, match=r"variants.depth: no block may be dropped"):
        table(unit="block", exclude=["*.attn"])


@pytest.mark.parametrize(
    ("unit", "rule", "target", "budgets"),
    [
        ("module", "size", 1, (3, 3)),
        ("module", "none", 1, (6,)),
        ("block", "size", 3, (1,)),
        ("block", "none", 3, (1,)),
        ("pair", "size", 2, (1,)),
    ],
)
def test_so_many_of_each_kind_are_dropped_in_every_candidate(unit, rule, target, budgets) -> None:
    space = make_space(MODULES, MODULES.units(table(unit=unit), rule), target, "searches.d")
    assert space.group_budgets == budgets
    rng = np.random.default_rng(0)
    starts = initial_candidates(space, 6, rng)
    assert len(starts) > 1 or unit == "pair"
    for candidate in [*starts, *make_offspring(starts, space, 8, rng)]:
        kept = [int(candidate[members].sum()) for members in space.members]
        assert tuple(kept) == budgets


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"exclude": ["*.0.attn"]}, 4, "target: 4 attn modules are to be dropped, but only 3 may be"),
        ({"unit": "block"}, 5, "target: 5 units of blocks are to be dropped, but only 4 may be"),
        ({"unit": "block"}, 4, "target: all 4 units would be dropped"),
        ({}, 4, "target: all 4 units would be dropped"),
    ],
)
def test_a_target_that_cannot_be_is_refused(settings, target, message) -> None:
    with pytest.raises(ConfigError, match=f"searches.d.{message}"):
        make_space(MODULES, MODULES.units(table(**settings), "size"), target, "searches.d")


class Pruned:
    """A tiny model, its depth units, and the same model with hooks in place of what is dropped."""

    def __init__(self, name: str, folder: Path, unit: str = "module") -> None:
        self.model = build(name)
        self.folder = save(self.model, folder)
        self.ids = tokens(count=4)
        blockwise = self.open()
        self.names = blockwise.block_names
        made = layer_table(blockwise.model).assign(bytes=1)
        modules = Drop(unit=unit).module_table(made, "variants.depth")  # type: ignore[arg-type]
        self.units = MODULES.units(modules, "size")

    def open(self) -> BlockwiseModel:
        return BlockwiseModel.from_folder(self.folder, torch.device("cpu"), resident=False)

    def unpack(self, block: int, layer: str, level: str) -> torch.Tensor:
        assert level == "half"
        return self.model.get_submodule(f"{self.names[block]}.{layer}").weight.detach() / 2

    def evaluator(self, memory: MemoryPlan = PLENTY) -> ModelEvaluator:
        model = self.open()
        dense = final_hidden(model, self.ids, 4096, "dense model", lambda: None)
        blocks = VariantBlocks(model, self.units, self.unpack, memory.weights, Counters())
        return ModelEvaluator(
            blocks, self.ids, dense, make_objective("kl", 1), memory, blocks.cache.counters, lambda: None
        )

    def fitness(self, candidate: np.ndarray) -> float:
        """Plain: the whole model with hooks, full logits."""
        ids = [self.ids[row, :length] for row, length in zip(MINIBATCH.sequences, MINIBATCH.lengths, strict=True)]
        teacher = [self.model(part[None]).logits[0] for part in ids]
        handles = []
        dropped = {
            module for unit, level in zip(self.units, candidate, strict=True) if not level for module in unit.modules
        }
        for index, name in enumerate(self.names):
            block = self.model.get_submodule(name)
            kinds = {kind for block, kind in dropped if block == index}
            if len(kinds) == 2:
                handles.append(block.register_forward_hook(_identity))
                continue
            for kind in kinds:
                last = [layer for layer in linear_layers(block) if layer.rpartition(".")[2] in OUTPUT_LAYERS[kind]]
                handles.append(
                    block.get_submodule(last[0]).register_forward_hook(lambda *args: torch.zeros_like(args[2]))
                )
        student = [self.model(part[None]).logits[0] for part in ids]
        for handle in handles:
            handle.remove()
        pairs = zip(teacher, student, strict=True)
        sums = [metrics.kl_divergence(metrics.distribution(p), q).sum() for p, q in pairs]
        return float(sum(sums) / sum(MINIBATCH.lengths))


def _identity(_, args, output):
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_fitness_is_that_of_the_model_without_the_modules(name: str, tmp_path: Path) -> None:
    pruned = Pruned(name, tmp_path)
    kept = np.ones(6, dtype=np.int16)
    candidates = np.array(
        [kept, [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1]], np.int16
    )
    expected = [pruned.fitness(candidate) for candidate in candidates]
    for memory in (PLENTY, SCARCE):
        found = [judged.fitness for judged in pruned.evaluator(memory).evaluate(candidates, MINIBATCH)]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    assert expected[0] < 1e-6 < min(expected[1:])


def test_pairs_drop_both_blocks_and_work_is_only_done_for_what_is_left(tmp_path: Path) -> None:
    pruned = Pruned("llama", tmp_path, "pair")
    assert [unit.modules for unit in pruned.units] == [((0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp"))]
    evaluator = pruned.evaluator()
    candidates = np.array([[0]], dtype=np.int16)
    found = evaluator.evaluate(candidates, MINIBATCH)[0].fitness
    assert found == pytest.approx(pruned.fitness(candidates[0]), rel=1e-5)
    counters = evaluator.counters
    assert counters.block_tokens == counters.block_tokens_alone == MINIBATCH.tokens  # one block of three
    weights = sum(
        parameter.nbytes
        for name, parameter in pruned.model.named_parameters()
        if "layers.2." in name and "proj" in name
    )
    assert counters.dense_bytes == weights  # nothing was read for the others


def test_levels_of_layers_and_of_modules_mix_and_dense_is_a_level(tmp_path: Path) -> None:
    pruned = Pruned("llama", tmp_path)
    level = (Level("half", 0.0, 0, 0),)
    pruned.units = (
        *pruned.units[:4],
        Unit("q", 1, "self_attn.q_proj", "layers", 1, level),
        Unit("down", 1, "mlp.down_proj", "layers", 1, level),
        *pruned.units[4:],
    )
    for unit, layer in ((4, "self_attn.q_proj"), (5, "mlp.down_proj")):
        assert pruned.units[unit].layer == layer
    candidates = np.full((4, 8), 1, dtype=np.int16)
    candidates[:, 4:6] = [[DENSE_LEVEL, DENSE_LEVEL], [0, DENSE_LEVEL], [0, 0], [DENSE_LEVEL, 0]]
    candidates[2, 2] = 0  # without the attention of block 1, the level of its q_proj means nothing
    fitness = [judged.fitness for judged in pruned.evaluator().evaluate(candidates, MINIBATCH)]
    assert fitness[0] < 1e-6 < min(fitness[1:])
    without = np.array([1, 1, 0, 1, DENSE_LEVEL, 0, 1, 1], dtype=np.int16)
    assert pruned.evaluator().evaluate(without[None], MINIBATCH)[0].fitness == pytest.approx(fitness[2], rel=1e-6)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = prepare(tmp_path_factory.mktemp("depth"))
    make_module_table(StageContext(run), "depth", Drop())
    return run


def test_a_search_drops_what_was_asked_and_lists_every_module(prepared: Run) -> None:
    own = fresh(prepared, "modules")
    run_search(StageContext(own, COMPUTE), "d", SEARCH)
    made = read_table(own.configuration("d"), CONFIGURATION)
    assert made["unit"].tolist() == [f"model.layers.{block}.{kind}" for block in range(2) for kind in ("attn", "mlp")]
    assert made[made["level"] == "drop"].groupby("layer").size().to_dict() == {"attn": 1, "mlp": 1}
    assert made["value"].tolist() == [1.0 if level == "drop" else 0.0 for level in made["level"]]
    stored = read_table(own.layers, LAYERS).groupby(["block", "module"])["parameters"].sum()
    assert made["parameters"].tolist() == stored.tolist()
    assert made["bytes"].tolist() == [4 * row.parameters * row.cost for row in made.itertuples()]


def test_a_start_from_sensitivities_serves_depth_too(prepared: Run) -> None:
    own = fresh(prepared, "sensitive")
    sensitive = SEARCH.model_copy(update={"start": "sensitivity", "sensitivity_tokens": 24})
    search_with_effects(StageContext(own, COMPUTE), "d", sensitive)
    assert read_table(own.effects(sensitive.effects().name), EFFECTS)["level"].tolist() == ["drop"] * 4
    assert read_table(own.configuration("d"), CONFIGURATION)["level"].value_counts().to_dict() == {"keep": 2, "drop": 2}


def test_one_name_holds_the_variants_of_one_method(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    make_module_table(StageContext(run), "gptq", Drop(unit="block"))
    assert sorted(path.name for path in run.module_table("gptq").parent.iterdir()) == ["modules.parquet"]
    with pytest.raises(Exception, match="missing"):
        VariantStore(run, "gptq")


def test_a_table_of_another_model_is_refused(prepared: Run) -> None:
    own = fresh(prepared, "other")
    path = own.module_table("alien")
    write_table(read_table(prepared.module_table("depth"), SCHEMA), path, SCHEMA, provenance(fingerprint="0" * 64))
    with pytest.raises(Exception, match="was made for another model"):
        run_search(StageContext(own, COMPUTE), "d", SEARCH.model_copy(update={"variants": "alien"}))
