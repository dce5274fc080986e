"""OWL (arXiv 2310.05175): blocks with more outliers among their weights keep more of them.

The outliers of a block are the weights whose Wanda score |w| ||x|| exceeds M times the mean score of the block. Blocks
are pruned less the larger their share of outliers, within lambda of the target. The norms of the inputs are the roots
of the Hessians' diagonals, so they come from the same calibration tokens as the variants.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Family, Method
from evopress.compression.families import Sparsity
from evopress.search.base import Strategy
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from evopress.config.context import StageContext
    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Candidate, Space


class Owl(Strategy):
    """OWL (arXiv 2310.05175): blocks whose weights have more outliers keep more; for sparsity variants."""

    families: ClassVar[tuple[type[Family], ...]] = (Sparsity,)
    needs_hessians: ClassVar[bool] = True

    strategy: Literal["owl"] = "owl"
    owl_lambda: float = Field(0.08, ge=0, lt=1, description="Half of the span of the blocks' sparsities.")
    owl_m: float = Field(
        5.0, gt=0, description="An outlier's score |w| ||x|| exceeds this many times the block's mean."
    )

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Choose levels by the outliers of each block, from its weights and Hessians."""
        import numpy as np

        from evopress.search.evaluation import SearchResult
        from evopress.util.progress import progress

        space = problem.space
        blocks = sorted({unit.block for unit in space.units})
        ratios = []
        with progress("outliers", len(blocks), "blocks") as bar:
            for block in blocks:
                ratios.append(outlier_ratio(_block_scores(context, space, block), self.owl_m))
                bar.advance()
        densities = block_densities(np.array(ratios), self.share, self.owl_lambda)
        by_block = dict(zip(blocks, densities, strict=True))
        wanted = np.array([by_block[unit.block] * unit.parameters for unit in space.units])
        return SearchResult(nearest_candidate(space, wanted, problem.where))

    def problems(self, where: str, method: Method) -> "Iterator[str]":
        """Shares of the weights are all that it allots."""
        yield from super().problems(where, method)
        if isinstance(self.target, SizeTarget):
            yield f"{where}.target: owl allots an average sparsity, as in 0.5, not the size of a file"

    def workers(self, processes: int) -> int:
        """One, that scores weights."""
        return 1

    def sentence(self) -> str:
        """End of a sentence on levels."""
        return "chosen by the outliers of each block ([OWL](https://arxiv.org/abs/2310.05175))"


def outlier_ratio(scores: "Sequence[Tensor]", m: float) -> float:
    """Share of the scores of all layers of a block that exceed ``m`` times their mean (section 3.2)."""
    import torch

    count = sum(score.numel() for score in scores)
    limit = m * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > limit).count_nonzero()) for score in scores) / count


def block_densities(ratios: "NDArray[np.float64]", sparsity: float, spread: float) -> "NDArray[np.float64]":
    """Share of weights that each block keeps: linear in its outliers, ``1 - sparsity`` on average (section 3.3).

    Args:
        ratios: share of outliers of each block, [blocks].
        sparsity: target.
        spread: lambda; the least and the most outlying block keep shares that lie 2 lambda apart.
    """
    import numpy as np

    span = ratios.max() - ratios.min()
    raised = (ratios - ratios.min()) / span * 2 * spread if span > 0 else np.zeros_like(ratios)
    return np.clip(raised - raised.mean() + 1 - sparsity, 0.0, 1.0)


def nearest_candidate(space: "Space", wanted: "NDArray[np.float64]", where: str) -> "Candidate":
    """The levels whose costs are nearest to the wanted ones, and then the least changes that make the budget hold.

    Args:
        space: one budget for all units.
        wanted: cost that each unit should have, [units].
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: units at their lowest level still exceed the budget.
    """
    import numpy as np

    from evopress.search.budget import fill_budget, repair

    units = np.arange(len(space.units))
    candidate = np.abs(space.costs - wanted[:, None]).argmin(axis=1).astype(np.int16)

    def least_moved(options: "NDArray[np.int64]", slack: int) -> int | None:
        """The unit whose squared distance from the wanted cost grows least."""
        if not slack:
            return None
        moved = candidate[options] + (1 if slack > 0 else -1)
        now, then = ((space.costs[options, levels] - wanted[options]) ** 2 for levels in (candidate[options], moved))
        return int(options[(then - now).argmin()])

    if repair(candidate, space, units, space.budget - space.cost_of(candidate), least_moved) is None:
        raise ConfigError(f"{where}.target: no levels meet it; name variants that reach it")
    fill_budget(candidate, space, units, space.budget - space.cost_of(candidate), least_moved)
    return candidate


def _block_scores(context: "StageContext", space: "Space", block: int) -> "list[Tensor]":
    """Scores |w| ||x|| of the searched layers of a block, each [rows, columns]."""
    import torch

    from evopress.artifacts.provenance import Provenance, require_same_model
    from evopress.artifacts.tables import LAYERS, read_table
    from evopress.artifacts.tensors import check_tensors, read_tensors
    from evopress.models.checkpoint import Checkpoint

    run, device = context.run, context.device
    names = [layer.name for unit in space.units if unit.block == block for layer in unit.layers]
    layers = read_table(run.layers, LAYERS).set_index("name")
    path = run.hessian(block)
    require_same_model(run, Provenance(**check_tensors(path)["provenance"]), path)
    hessians = read_tensors(path, set(layers.loc[names, "input_group"]))
    weights = Checkpoint(run.model).read([f"{name}.weight" for name in names], device=device, dtype=torch.float32)
    norms = {group: hessian.diagonal().clamp(min=0.0).sqrt().to(device) for group, hessian in hessians.items()}
    return [weights[f"{name}.weight"].abs() * norms[str(layers.loc[name, "input_group"])] for name in names]
