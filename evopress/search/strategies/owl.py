"""OWL (arXiv 2310.05175): blocks with more outliers among their weights keep more of them.

The outliers of a block are the weights whose Wanda score |w| ||x|| exceeds M times the mean score of the block. Blocks
are pruned less the larger their share of outliers, within lambda of the target. The norms of the inputs are the roots
of the Hessians' diagonals, so they come from the same calibration tokens as the variants.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, require_same_model
from evopress.artifacts.tables import LAYERS, read_table
from evopress.artifacts.tensors import check_tensors, read_tensors
from evopress.models.checkpoint import Checkpoint
from evopress.search.settings import OwlSettings
from evopress.search.space import Candidate, Space
from evopress.util.errors import ConfigError
from evopress.util.progress import progress


def owl(run: Run, space: Space, settings: OwlSettings, device: torch.device, where: str) -> Candidate:
    """Choose levels by the outliers of each block, from its weights and Hessians.

    Raises:
        ArtifactError: layers or Hessians are missing, damaged or of another model.
        ConfigError: no choice near the wanted sparsities meets the target.
        ModelError: a weight cannot be read.
    """
    blocks = sorted({unit.block for unit in space.units})
    ratios = []
    with progress("outliers", len(blocks), "blocks") as bar:
        for block in blocks:
            ratios.append(outlier_ratio(_block_scores(run, space, block, device), settings.owl_m))
            bar.advance()
    densities = block_densities(np.array(ratios), settings.target, settings.owl_lambda)
    by_block = dict(zip(blocks, densities, strict=True))
    wanted = np.array([by_block[unit.block] * unit.parameters for unit in space.units])
    return nearest_candidate(space, wanted, where)


def outlier_ratio(scores: Sequence[Tensor], m: float) -> float:
    """Share of the scores of all layers of a block that exceed ``m`` times their mean (section 3.2)."""
    count = sum(score.numel() for score in scores)
    limit = m * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > limit).count_nonzero()) for score in scores) / count


def block_densities(ratios: NDArray[np.float64], sparsity: float, spread: float) -> NDArray[np.float64]:
    """Share of weights that each block keeps: linear in its outliers, ``1 - sparsity`` on average (section 3.3).

    Args:
        ratios: share of outliers of each block, [blocks].
        sparsity: target.
        spread: lambda; the least and the most outlying block keep shares that lie 2 lambda apart.
    """
    span = ratios.max() - ratios.min()
    raised = (ratios - ratios.min()) / span * 2 * spread if span > 0 else np.zeros_like(ratios)
    return np.clip(raised - raised.mean() + 1 - sparsity, 0.0, 1.0)


def nearest_candidate(space: Space, wanted: NDArray[np.float64], where: str) -> Candidate:
    """The levels whose costs are nearest to the wanted ones, and then the least changes that make the budget hold.

    Args:
        space: one budget for all units.
        wanted: cost that each unit should have, [units].
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: units at their lowest level still exceed the budget.
    """
    costs, units = space.costs, np.arange(len(space.units))
    candidate = np.abs(costs - wanted[:, None]).argmin(axis=1).astype(np.int16)
    while (slack := space.budget - space.cost_of(candidate)) < 0:
        lower = units[candidate > 0]
        if not len(lower):
            raise ConfigError(f"{where}.target: no levels meet it; name variants that reach it")
        candidate[_least_moved(costs, wanted, candidate, lower, -1)] -= 1
    while slack > 0:
        higher = units[candidate < space.top]
        higher = higher[costs[higher, candidate[higher] + 1] - costs[higher, candidate[higher]] <= slack]
        if not len(higher):
            break
        unit = _least_moved(costs, wanted, candidate, higher, 1)
        slack -= int(costs[unit, candidate[unit] + 1] - costs[unit, candidate[unit]])
        candidate[unit] += 1
    return candidate


def _least_moved(
    costs: NDArray[np.int64], wanted: NDArray[np.float64], candidate: Candidate, units: NDArray[np.int64], step: int
) -> int:
    """The first unit whose squared distance from the wanted cost grows least when its level moves by ``step``."""
    now = (costs[units, candidate[units]] - wanted[units]) ** 2
    then = (costs[units, candidate[units] + step] - wanted[units]) ** 2
    return int(units[(then - now).argmin()])


def _block_scores(run: Run, space: Space, block: int, device: torch.device) -> list[Tensor]:
    """Scores |w| ||x|| of the searched layers of a block, each [rows, columns]."""
    names = [unit.name for unit in space.units if unit.block == block]
    layers = read_table(run.layers, LAYERS).set_index("name")
    path = run.hessian(block)
    require_same_model(run, Provenance(**check_tensors(path)["provenance"]), path)
    hessians = read_tensors(path, set(layers.loc[names, "input_group"]))
    weights = Checkpoint(run.model).read([f"{name}.weight" for name in names], device=device, dtype=torch.float32)
    norms = {group: hessian.diagonal().clamp(min=0.0).sqrt().to(device) for group, hessian in hessians.items()}
    return [weights[f"{name}.weight"].abs() * norms[str(layers.loc[name, "input_group"])] for name in names]
