"""SparseGPT (arXiv 2301.00774) for all sparsities of a layer in one sweep over its columns.

Rows are independent given the Hessian and the mask, so levels are stacked beside rows, and so are layers of the same
input and shape; all share one Cholesky factor. With H = R R^T, R upper triangular, the removal of column j's weight
shifts the columns after it by -e_j G_j, where G = R_jj (R^-1)_j is the j-th row of the inverse factor scaled to a unit
diagonal, and costs e_j^2 R_jj^2 (R_jj^2 is 1/[H_j^-1]_jj, with H_j the Hessian of the columns from j on).

Weights that are kept may be rounded in the same sweep (section 3.5, joint sparsification and quantization): the columns
after one make up for its weights that went and for its rounding alike. The grid of a group of inputs is fitted when the
sweep reaches it.

The sweep looks left: a chunk of columns first collects, in one matrix product, what the errors of all columns before it
do to it. Chunks nest (a block, a few columns, one column), so that nearly all work is in the products of the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from evopress.compression.cholesky import INNER_CHUNK, damped_cholesky, forward, invert_unit_lower, sweep_columns
from evopress.compression.descent import Descent
from evopress.compression.grid import SCALE_DTYPE, fit_grid, highest_codes
from evopress.compression.pruning import lowest, ranks
from evopress.compression.sparsity import Pruned, Rounded, SparsityLevel, portions
from evopress.util.errors import CompressionError


@dataclass(frozen=True)
class InverseFactor:
    """What a sweep needs of the damped Hessian."""

    feedback: Tensor
    """Rows of the inverse factor over their diagonal, unit upper triangular, float32 [columns, columns]."""
    pivots: Tensor
    """R_jj: removing a weight w of column j costs (w R_jj)^2; float32 [columns]."""
    dead: Tensor
    """Inputs that are always zero, bool [columns]."""
    shift: float
    """What was added to the diagonal."""
    damping: float


@dataclass(frozen=True)
class Rounding:
    """How weights that are kept are rounded: to grids with a zero point."""

    bits: int
    group: int
    """Inputs that share a scale."""


def inverse_factor(hessian: Tensor, damping: float) -> InverseFactor:
    """Factorize the damped Hessian and invert the factor, in float64.

    Raises:
        CompressionError: Cholesky fails at any damping.
    """
    factor = damped_cholesky(hessian, damping)
    invert_unit_lower(factor.reversed_unit)
    feedback, dead = forward(factor.reversed_unit), hessian.diagonal() == 0
    return InverseFactor(feedback, factor.pivots.float(), dead, factor.shift, factor.damping)


def sparsegpt(
    weights: Tensor,
    factor: InverseFactor,
    levels: Sequence[SparsityLevel],
    block_size: int = 128,
    even_blocks: bool = False,
    rounding: Rounding | None = None,
    descent: Descent | None = None,
    passes: int = 0,
) -> Pruned:
    """Prune layers to several sparsities, compensating each removed weight in the columns after it.

    Unstructured levels choose their mask per layer and block of columns, by the lowest (w R_jj)^2 of the compensated
    weights when the sweep reaches the block; each block gives up its share of the exact count. The paper's shares are
    even; by default they follow the scores of the weights as given, over the whole layer, which lowers the output error
    by a tenth (late columns have few left to make up for them). A pattern n:m chooses among m neighbours when the sweep
    reaches them. Weights are rounded to the type in which they are stored before their error is compensated. A dead
    input never influences the output: its weights go first.

    Args:
        weights: [layers, rows, columns], layers of the same input and shape.
        factor: of their Hessian.
        levels: all unstructured, or all of patterns with the same m.
        block_size: columns between two updates by all earlier ones; also those among which a mask is chosen.
        even_blocks: take the same share from every block of columns, as the paper does.
        rounding: of the weights that are kept; None leaves them as they are. Its groups divide the columns, and are
            divided by the m of patterns. Blocks of columns are cut where groups end.
        descent: on the same Hessian; only needed for ``passes``.
        passes: over the columns after SparseGPT's own, in each of which the kept weights of every column are made anew,
            given all others; masks and grids stay.

    Raises:
        CompressionError: a compensated weight does not fit the type of the weights, or the scales.
    """
    sweep = _Sweep(weights, factor, levels, block_size, even_blocks, rounding)
    sweep.run()
    errors = sweep.errors() if descent is None or not passes else sweep.descend(descent, passes)
    pruned = Pruned(sweep.inputs_last(sweep.stored), sweep.inputs_last(sweep.kept), errors, sweep.rounded())
    if not bool(torch.isfinite(pruned.errors).all()):
        raise CompressionError(f"a compensated weight exceeds {weights.dtype}; raise the damping or exclude the layer")
    return pruned


class _Sweep:
    """The passes over the columns for all levels of all layers.

    Buffers are [columns, levels x layers x rows], so that a column of everything is contiguous. ``panel`` holds for
    columns to come the compensated weights, for columns done the error that the columns after them make up for.
    """

    def __init__(
        self,
        weights: Tensor,
        factor: InverseFactor,
        levels: Sequence[SparsityLevel],
        block_size: int,
        even_blocks: bool,
        rounding: Rounding | None,
    ) -> None:
        layers, rows, columns = weights.shape
        self.shape = len(levels), layers, rows, columns
        self.factor, self.levels = factor, levels
        live = weights.float().masked_fill(factor.dead, 0.0)
        self.original = live.flatten(0, 1).t().contiguous()
        self.panel = self.original[:, None].repeat(1, len(levels), 1).flatten(1)
        self.kept = torch.empty_like(self.panel, dtype=torch.bool)
        self.stored = torch.empty_like(self.panel, dtype=weights.dtype)
        self.pruned = torch.empty_like(self.panel[0])
        self.grids = _Grids(rounding, self.panel, factor.pivots) if rounding else None
        self.block_size, pattern = block_size, levels[0].pattern
        group = rounding.group if rounding else None
        self.chunks, self.choice = _chunks(min(block_size, columns), pattern and pattern[1], group)
        self.mask, self.mask_start = torch.empty_like(self.panel[: self.choice]), 0
        outer = range(0, columns, self.chunks[0])
        starts = [begin for start in outer for begin in range(start, min(start + outer.step, columns), self.choice)]
        widths = [stop - start for start, stop in pairwise([*starts, columns])]
        self.block_at = {start: number for number, start in enumerate(starts)}
        self.shares = self._even_shares(widths) if even_blocks or pattern else self._shares_by_score(widths)

    def _even_shares(self, widths: list[int]) -> list[list[list[int]]]:
        """Weights that go at each level, from each layer, in each block of columns of these ``widths``."""
        return [[portions(level.removed, widths)] * self.shape[1] for level in self.levels]

    def _shares_by_score(self, widths: list[int]) -> list[list[list[int]]]:
        """The same, as many as the lowest scores of the whole layer have there before anything is compensated."""
        _, layers, rows, columns = self.shape
        scores = (self.original * self.factor.pivots[:, None]).abs_().view(columns, layers, rows)
        flat = [scores[:, layer].flatten() for layer in range(layers)]
        return [
            [[int(part.sum()) for part in lowest(own, level.removed).view(columns, rows).split(widths)] for own in flat]
            for level in self.levels
        ]

    def run(self) -> None:
        """Visit all columns."""
        sweep_columns(self.panel, self.factor.feedback, self.chunks, self._prune_column, self._reach, alpha=-1)

    def descend(self, descent: Descent, passes: int) -> Tensor:
        """Go over the columns ``passes`` times more; tr(dW H dW^T) by level and layer, as `errors` gives it."""
        levels, layers, rows, columns = self.shape
        deviation = self.panel.view(columns, levels, -1)  # errors are not needed any more
        torch.sub(self.original[:, None], self.stored.view(columns, levels, -1), out=deviation)
        for _ in range(passes):
            descent.run(self.original, deviation, self._make_again, self.block_size)
        return descent.errors(deviation).view(levels, layers, rows).sum(-1)

    def _make_again(self, column: int, weights: Tensor) -> Tensor:
        """What a column stores for the best ``weights`` [levels, layers x rows], where its mask keeps them."""
        torch.mul(weights.flatten(), self.kept[column], out=self.pruned)
        if self.grids:
            self.grids.round_(column, self.pruned)
        return self.stored[column].copy_(self.pruned).view_as(weights)

    def inputs_last(self, tensor: Tensor) -> Tensor:
        """[columns, everything] to [levels, layers, rows, columns]."""
        return tensor.t().contiguous().view(self.shape)

    def rounded(self) -> Rounded | None:
        """Codes and grids, in the layout of `Rounded`."""
        if self.grids is None:
            return None
        scales, zeros = (
            part.t().contiguous().view(*self.shape[:3], -1) for part in (self.grids.scales, self.grids.zeros)
        )
        codes = self.inputs_last(self.grids.codes)
        return Rounded(self.grids.bits, codes, scales.to(SCALE_DTYPE), zeros.byte())

    def errors(self) -> Tensor:
        """tr(dW H dW^T) by level and layer; to be called once, after `run`."""
        levels, layers, rows, columns = self.shape
        deviation = torch.zeros_like(self.pruned)
        for first in range(0, columns, INNER_CHUNK):
            chunk = slice(first, first + INNER_CHUNK)
            stored = self.stored[chunk].view(-1, levels, layers * rows)
            deviation += (self.original[chunk, None] - stored).square_().sum(0).flatten()
        # The sum of R_jj^2 e_j^2 is the error under the damped Hessian; the damping's share is taken off again.
        damped = torch.mv(self.panel.square_().t(), self.factor.pivots.square())
        by_row = damped.double() - self.factor.shift * deviation.double()
        return by_row.view(levels, layers, rows).sum(-1).clamp_(min=0.0)

    def _reach(self, width: int, begin: int, end: int) -> None:
        """Choose what a chunk keeps, and fit the grids of a group, where one begins."""
        if width == self.choice:
            self._choose(begin, end)
        if self.grids and width == self.grids.group:
            self.grids.fit(begin, self._known_to_stay(begin, end))

    def _choose(self, begin: int, end: int) -> None:
        """Choose the weights of columns ``begin`` to ``end`` that are kept."""
        if self.levels[0].pattern is None:
            self._choose_anywhere(begin, end)
        else:
            self._choose_among_neighbours(begin, end)
        self.mask_start = begin
        self.mask[: end - begin].copy_(self.kept[begin:end])

    def _choose_anywhere(self, begin: int, end: int) -> None:
        """A threshold for each level of each layer; one at a time, so that the scores stay in the cache."""
        levels, layers, rows, _ = self.shape
        panel, kept = (whole[begin:end].view(-1, levels, layers, rows) for whole in (self.panel, self.kept))
        pivots = self.factor.pivots[begin:end, None]
        scores = torch.empty(end - begin, rows, device=pivots.device)
        for level in range(levels):
            for layer in range(layers):
                torch.mul(panel[:, level, layer], pivots, out=scores).abs_()
                count = self.shares[level][layer][self.block_at[begin]]
                kept[:, level, layer] = ~lowest(scores.flatten(), count).view_as(scores)

    def _choose_among_neighbours(self, begin: int, end: int) -> None:
        self.kept[begin:end] = self._highest_neighbours(begin, end)

    def _highest_neighbours(self, begin: int, end: int) -> Tensor:
        """Those of columns ``begin`` to ``end``, whole groups of m, that would be kept now, bool [columns, all]."""
        scores = (self.panel[begin:end] * self.factor.pivots[begin:end, None]).abs_()
        limits = [level.pattern[1] - level.pattern[0] for level in self.levels if level.pattern]
        limit = torch.tensor(limits, device=scores.device)[:, None]
        order = ranks(scores.unflatten(0, (-1, self.choice)), 1)
        return (order.view(end - begin, len(limits), -1) >= limit).flatten(1)

    def _known_to_stay(self, begin: int, end: int) -> Tensor:
        """Weights of a group when the sweep reaches it, with zeros for those that go, as far as that is known."""
        panel = self.panel[begin:end]
        if end - begin <= self.choice:
            return panel * self.mask[begin - self.mask_start : end - self.mask_start]
        return panel * self._highest_neighbours(begin, end) if self.levels[0].pattern else panel

    def _prune_column(self, column: int) -> None:
        torch.mul(self.panel[column], self.mask[column - self.mask_start], out=self.pruned)
        if self.grids:
            self.grids.round_(column, self.pruned)
        stored = self.stored[column].copy_(self.pruned)
        torch.sub(self.panel[column], stored, out=self.panel[column])


class _Grids:
    """The grids of all groups of inputs, each fitted when the sweep reaches it, and the codes of weights."""

    def __init__(self, rounding: Rounding, panel: Tensor, pivots: Tensor) -> None:
        self.bits, self.group = rounding.bits, rounding.group
        self.highest = highest_codes(torch.tensor([[rounding.bits]], device=panel.device))
        self.curvature = pivots.square()
        self.codes = torch.empty_like(panel, dtype=torch.uint8)
        self.scales = panel.new_empty(len(panel) // self.group, panel.shape[1])
        self.inverse_scales, self.zeros = torch.empty_like(self.scales), torch.empty_like(self.scales)
        self.rounded = torch.empty_like(panel[0])

    def fit(self, begin: int, values: Tensor) -> None:
        """Fit the grids of the group of inputs from ``begin`` on to ``values`` [inputs, everything]."""
        importance, index = self.curvature[begin : begin + self.group], begin // self.group
        grid = fit_grid(values[:, None], self.highest, symmetric=False, importance=importance, clip_search=True)
        self.scales[index], self.zeros[index] = grid.scales[0], grid.zeros[0]
        torch.reciprocal(grid.scales[0], out=self.inverse_scales[index])

    def round_(self, column: int, weights: Tensor) -> None:
        """Round the ``weights`` [everything] of a column in place; zeros stay zeros."""
        group = column // self.group
        torch.addcmul(self.zeros[group], weights, self.inverse_scales[group], out=self.rounded)
        torch.minimum(self.rounded.round_().clamp_(min=0.0), self.highest[0], out=self.rounded)
        self.codes[column].copy_(self.rounded)
        torch.sub(self.rounded, self.zeros[group], out=weights).mul_(self.scales[group])


def _chunks(block_size: int, neighbours: int | None, group: int | None) -> tuple[list[int], int]:
    """Widths of nested chunks, wide to narrow, ending in 1, and the one among whose columns a mask is chosen.

    Args:
        block_size: columns between two updates by all earlier ones.
        neighbours: how many compete, where they do; among the widths.
        group: inputs whose grid is fitted when the sweep reaches them, where weights are rounded; among the widths.
    """
    block, inner = block_size, min(INNER_CHUNK, block_size)
    if neighbours is not None:
        block, inner = -(-block_size // neighbours) * neighbours, INNER_CHUNK // neighbours * neighbours
    if group is not None:
        block = block // group * group or block
        inner = inner if inner < group else 0
    widths = {block, inner, neighbours or block, group or block, 1} - {0}
    return sorted(widths, reverse=True), neighbours or block
