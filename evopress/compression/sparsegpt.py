"""SparseGPT (arXiv 2301.00774) for all sparsities of a layer in one sweep over its columns.

Rows are independent given the Hessian and the mask, so levels are stacked beside rows, and so are layers of the same
input and shape; all share one Cholesky factor. With H = R R^T, R upper triangular, the removal of column j's weight
shifts the columns after it by -e_j G_j, where G = R_jj (R^-1)_j is the j-th row of the inverse factor scaled to a unit
diagonal, and costs e_j^2 R_jj^2 (R_jj^2 is 1/[H_j^-1]_jj, with H_j the Hessian of the columns from j on).

The sweep looks left: a chunk of columns first collects, in one matrix product, what the errors of all columns before it
do to it. Chunks nest (a block, a few columns, one column), so that nearly all work is in the products of the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compression.cholesky import damped_cholesky, forward, invert_unit_lower
from evopress.compression.pruning import Pruned, lowest, ranks
from evopress.compression.sparsity import SparsityLevel, portions
from evopress.util.errors import CompressionError

_INNER_CHUNK = 16
"""Columns that are updated one vector at a time."""


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

    Raises:
        CompressionError: a compensated weight does not fit the type of the weights.
    """
    sweep = _Sweep(weights, factor, levels, block_size, even_blocks)
    sweep.run()
    pruned = Pruned(sweep.inputs_last(sweep.stored), sweep.inputs_last(sweep.kept), sweep.errors())
    if not bool(torch.isfinite(pruned.errors).all()):
        raise CompressionError(f"a compensated weight exceeds {weights.dtype}; raise the damping or exclude the layer")
    return pruned


class _Sweep:
    """One pass over the columns for all levels of all layers.

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
        pattern = levels[0].pattern
        self.choice = pattern[1] if pattern else min(block_size, columns)
        self.mask, self.mask_start = torch.empty_like(self.panel[: self.choice]), 0
        self.shares = self._even_shares() if even_blocks or pattern else self._shares_by_score()
        self.chunks = _chunks(min(block_size, columns), pattern[1] if pattern else None)

    def _even_shares(self) -> list[list[list[int]]]:
        """Weights that go at each level, from each layer, in each block of columns."""
        _, layers, _, columns = self.shape
        widths = [min(self.choice, columns - start) for start in range(0, columns, self.choice)]
        return [[portions(level.removed, widths)] * layers for level in self.levels]

    def _shares_by_score(self) -> list[list[list[int]]]:
        """The same, as many as the lowest scores of the whole layer have there before anything is compensated."""
        _, layers, rows, columns = self.shape
        scores = (self.original * self.factor.pivots[:, None]).abs_().view(columns, layers, rows)
        flat = [scores[:, layer].flatten() for layer in range(layers)]
        return [
            [
                [int(part.sum()) for part in lowest(own, level.removed).view(columns, rows).split(self.choice)]
                for own in flat
            ]
            for level in self.levels
        ]

    def run(self) -> None:
        """Visit all columns."""
        self._visit(0, len(self.panel), self.chunks)

    def inputs_last(self, tensor: Tensor) -> Tensor:
        """[columns, everything] to [levels, layers, rows, columns]."""
        return tensor.t().contiguous().view(self.shape)

    def errors(self) -> Tensor:
        """tr(dW H dW^T) by level and layer; to be called once, after `run`."""
        levels, layers, rows, columns = self.shape
        deviation = torch.zeros_like(self.pruned)
        for first in range(0, columns, _INNER_CHUNK):
            chunk = slice(first, first + _INNER_CHUNK)
            stored = self.stored[chunk].view(-1, levels, layers * rows)
            deviation += (self.original[chunk, None] - stored).square_().sum(0).flatten()
        # The sum of R_jj^2 e_j^2 is the error under the damped Hessian; the damping's share is taken off again.
        damped = torch.mv(self.panel.square_().t(), self.factor.pivots.square())
        by_row = damped.double() - self.factor.shift * deviation.double()
        return by_row.view(levels, layers, rows).sum(-1).clamp_(min=0.0)

    def _visit(self, start: int, stop: int, chunks: Sequence[int]) -> None:
        """Prune columns ``start`` to ``stop``, to which all columns before ``start`` have contributed."""
        width, finer = chunks[0], chunks[1:]
        for begin in range(start, stop, width):
            end = min(begin + width, stop)
            if begin > start:
                influence = self.factor.feedback[start:begin, begin:end].t()
                self.panel[begin:end].addmm_(influence, self.panel[start:begin], alpha=-1)
            if width == self.choice:
                self._choose(begin, end)
            if finer:
                self._visit(begin, end, finer)
            else:
                self._prune_column(begin)

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
                count = self.shares[level][layer][begin // self.choice]
                kept[:, level, layer] = ~lowest(scores.flatten(), count).view_as(scores)

    def _choose_among_neighbours(self, begin: int, end: int) -> None:
        scores = (self.panel[begin:end] * self.factor.pivots[begin:end, None]).abs_()
        limits = [level.pattern[1] - level.pattern[0] for level in self.levels if level.pattern]
        limit = torch.tensor(limits, device=scores.device)[:, None]
        self.kept[begin:end] = (ranks(scores, 0).view(end - begin, len(limits), -1) >= limit).flatten(1)

    def _prune_column(self, column: int) -> None:
        torch.mul(self.panel[column], self.mask[column - self.mask_start], out=self.pruned)
        stored = self.stored[column].copy_(self.pruned)
        torch.sub(self.panel[column], stored, out=self.panel[column])


def _chunks(block_size: int, group: int | None) -> list[int]:
    """Widths of nested chunks, wide to narrow, ending in 1; a ``group`` of neighbours that compete is one of them."""
    widths = [block_size, min(_INNER_CHUNK, block_size), 1]
    if group is not None:
        widths = [-(-block_size // group) * group, _INNER_CHUNK // group * group, group, 1]
    return sorted({width for width in widths if width}, reverse=True)
