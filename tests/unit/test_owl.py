"""OWL: outlier ratios, densities of blocks, and the nearest levels within the budget."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finished_run import BLOCKS, make_results, provenance, write_tokens
from safetensors.torch import load_file, save_file

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, TRACE, read_table, write_table
from evopress.artifacts.tables import LAYERS as LAYER_SCHEMA
from evopress.artifacts.tensors import write_tensors
from evopress.compression.base import Level, Unit
from evopress.compression.families import SPARSITY
from evopress.compression.methods.pruning import Magnitude
from evopress.compression.stage import make_variants
from evopress.config.context import ComputeSettings, StageContext
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table
from evopress.search.run import run_search
from evopress.search.space import Space, make_space
from evopress.search.strategies.owl import Owl, block_densities, nearest_candidate, outlier_ratio
from evopress.util.errors import ArtifactError

COMPUTE = ComputeSettings(device="cpu", memory_gb=0.01)


def test_outliers_are_counted_against_the_mean_of_the_whole_block() -> None:
    quiet, loud = torch.ones(4, 5), torch.tensor([[1.0, 1.0, 1.0, 1.0, 55.0]])
    # The mean of 25 scores is 79 / 25 = 3.16, and one score exceeds 5 times that.
    assert outlier_ratio([quiet, loud], 5.0) == 1 / 25
    assert outlier_ratio([quiet], 5.0) == 0
    assert outlier_ratio([quiet, loud], 20.0) == 0


def test_densities_span_twice_lambda_around_the_target() -> None:
    densities = block_densities(np.array([0.01, 0.03, 0.02]), 0.7, 0.08)
    assert densities == pytest.approx([0.22, 0.38, 0.3])
    assert block_densities(np.array([0.02, 0.02]), 0.7, 0.08) == pytest.approx([0.3, 0.3])
    assert block_densities(np.array([0.0, 1.0]), 0.9, 0.2) == pytest.approx([0.0, 0.3])


def sparse_space(sizes: list[int], target: float, step: int = 10, each_way: int = 3) -> Space:
    units = []
    for number, size in enumerate(sizes):
        kept = [size // 2 + steps * step for steps in range(-each_way, each_way + 1)]
        levels = tuple(Level(str(k), 1 - k / size, k, k) for k in kept if 0 < k <= size)
        units.append(Unit(f"u{number}", number, "layer", "all", size, levels))
    return make_space(SPARSITY, units, target, "searches.o")


def test_the_nearest_levels_are_taken_where_they_fit() -> None:
    space = sparse_space([100, 100, 200], 0.5)
    candidate = nearest_candidate(space, np.array([38.0, 62.0, 100.0]), "searches.o")
    assert [unit.levels[i].cost for unit, i in zip(space.units, candidate, strict=True)] == [40, 60, 100]


def test_the_budget_is_kept_and_spent_with_the_least_changes() -> None:
    space = sparse_space([100, 100, 100], 0.5)
    over = nearest_candidate(space, np.array([56.0, 66.0, 48.0]), "searches.o")
    # The nearest are 60, 70 and 50: 30 too many. Units go down in the order in which that moves them least away.
    assert [unit.levels[i].cost for unit, i in zip(space.units, over, strict=True)] == [50, 60, 40]
    under = nearest_candidate(space, np.array([44.0, 30.0, 46.0]), "searches.o")
    assert space.cost_of(under) == space.budget == 150
    assert [unit.levels[i].cost for unit, i in zip(space.units, under, strict=True)] == [50, 40, 60]


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_exceeds_the_budget_or_leaves_a_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = sparse_space([int(size) for size in rng.integers(30, 300, 12)], 0.5)
    wanted = rng.uniform(0.2, 0.8, 12) * [unit.parameters for unit in space.units]
    candidate = nearest_candidate(space, wanted, "searches.o")
    assert 0 <= space.budget - space.cost_of(candidate) < 10


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A tiny model whose second block has outliers, pruned by magnitude."""
    run = make_results(tmp_path)
    write_tokens(run, "search", sequences=2)
    path = run.model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][::4, ::4] *= 30
    save_file(weights, path, metadata={"format": "pt"})
    layers = layer_table(BlockwiseModel.from_folder(run.model, torch.device("cpu")).model)
    write_table(layers, run.layers, LAYER_SCHEMA, provenance())
    for block in range(BLOCKS):
        rows = layers[layers["block"] == block].drop_duplicates("input_group")
        hessians = {row.input_group: torch.eye(row.columns) for row in rows.itertuples()}
        write_tensors(hessians, run.hessian(block), provenance(), {"tokens": 1})
        make_variants(StageContext(run, COMPUTE), "s", Magnitude(step=8, levels=8), [block])
    return run


def test_the_block_with_outliers_keeps_more(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "o", Owl(variants="s", target=0.5, owl_lambda=0.1, owl_m=5))
    configuration = read_table(run.configuration("o"), CONFIGURATION)
    totals = configuration.groupby("block")[["cost", "parameters"]].sum()
    kept = totals["cost"] / totals["parameters"]
    assert kept.tolist() == pytest.approx([0.4, 0.6], abs=0.02)
    assert 0 <= configuration["parameters"].sum() // 2 - configuration["cost"].sum() < 8
    assert read_table(run.trace("o"), TRACE).empty


def test_without_lambda_owl_is_uniform(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "o", Owl(variants="s", target=0.5, owl_lambda=0))
    assert set(read_table(run.configuration("o"), CONFIGURATION)["level"]) == {"0"}


def test_hessians_of_another_model_are_refused(run: Run) -> None:
    write_tensors({"a": torch.eye(2)}, run.hessian(1), provenance(fingerprint="e" * 64), {"tokens": 1})
    with pytest.raises(ArtifactError, match=r"block_001\.safetensors"):
        run_search(StageContext(run, COMPUTE), "o", Owl(variants="s", target=0.5))
