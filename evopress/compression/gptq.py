"""GPTQ (arXiv 2210.17323) for all bit-widths of a layer in one sweep over its columns.

Rows of a linear layer are independent given the Hessian, so levels are stacked beside rows and share one Cholesky
factor. The sweep uses the form of GPTQ that QuIP (arXiv 2307.13304) calls LDLQ and proves equal: with the Hessian
H = R R^T, R upper triangular, column j is rounded after adding the deviations of the columns before it,

    w'_j = w_j + sum over i < j of (w_i - q_i) R_ij / R_jj.

It needs no inverse, and the sums over i are matrix products: columns are visited in nested chunks, and each chunk first
collects what the columns before it, within the enclosing chunk, contribute. Further passes may follow (`descent`),
before each of which the scales of all groups are fitted to the codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compression.cholesky import INNER_CHUNK, damped_cholesky, forward, sweep_columns
from evopress.compression.descent import Descent
from evopress.compression.grid import SCALE_DTYPE, SMALLEST_SCALES, fit_grid, highest_codes
from evopress.compression.layers import check_group_size


@dataclass(frozen=True)
class Quantized:
    """All levels of a linear layer, columns in their original order."""

    codes: Tensor
    """uint8 [levels, rows, columns]."""
    scales: Tensor
    """In the type that stores them, [levels, rows, groups]."""
    zeros: Tensor
    """uint8 [levels, rows, groups]."""
    errors: Tensor
    """Rows of tr(dW H dW^T), with the Hessian as given (no damping); float64 [levels, rows]."""
    damping: float
    """Damping with which Cholesky succeeded."""

    @property
    def weights(self) -> Tensor:
        """Dequantized weights, float32 [levels, rows, columns]."""
        levels, rows, groups = self.scales.shape
        codes = self.codes.view(levels, rows, groups, -1).float()
        return ((codes - self.zeros[..., None].float()) * self.scales[..., None].float()).view(levels, rows, -1)


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a damped Hessian, in the order in which columns are visited."""

    feedback: Tensor
    """R_ij / R_jj, unit upper triangular, float32 [columns, columns]."""
    curvature: Tensor
    """R_jj^2: what a squared rounding error of column j costs, float32 [columns]."""
    shift: float
    """What was added to the diagonal."""
    damping: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: Sequence[int],
    group_size: int | None = None,
    symmetric: bool = False,
    activation_order: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    clip_search: bool = False,
    rows_at_once: int | None = None,
    scale_dtype: torch.dtype = SCALE_DTYPE,
    passes: int = 0,
) -> Quantized:
    """Quantize a linear layer at several bit-widths, compensating each column's error in the columns after it.

    Without activation order, a group's grid is fitted when the sweep reaches it, to the compensated weights. With it,
    columns are visited by decreasing Hessian diagonal, so grids are fitted beforehand to the groups of the original
    order. A dead input (zero Hessian diagonal) never influences the output: its weights become zero.

    Args:
        weight: [rows, columns]; layers with the same input may be stacked by rows, which changes nothing.
        hessian: X^T X over the calibration tokens, [columns, columns].
        bits: bit-widths, the levels.
        group_size: inputs that share a scale; None is all of them.
        symmetric: grids without a zero point.
        activation_order: visit columns by decreasing Hessian diagonal.
        damping: share of the mean Hessian diagonal added to the diagonal; raised tenfold while Cholesky fails.
        block_size: columns between two updates by the columns of all earlier blocks.
        clip_search: fit each grid with the best clipping of its range, weighted by curvature.
        rows_at_once: rows per sweep, to bound memory (about 14 bytes x levels x rows x columns); None is all.
        scale_dtype: float16 or bfloat16, which stores the scales.
        passes: over the columns after GPTQ's own, each with scales fitted anew and every column rounded again, given
            all others. They hold two more matrices as large as the Hessian, and about twice the memory per row.

    Raises:
        CompressionError: the group size does not divide the columns, Cholesky fails at any damping, or a weight is
            beyond the scales.
    """
    columns = weight.shape[1]
    group = check_group_size(group_size, columns)
    dead = hessian.diagonal() == 0
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if activation_order else None
    visited = hessian if order is None else hessian[order][:, order]
    factor = factorize(visited, damping)
    descent = Descent(visited, factor.shift) if passes else None
    live = weight.float().masked_fill(dead, 0.0)
    sweeps = [
        _Sweep(rows, factor, torch.tensor(bits), group, symmetric, order, block_size, clip_search, scale_dtype).run(
            descent, passes
        )
        for rows in live.split(rows_at_once or weight.shape[0])
    ]
    codes, scales, zeros, errors = (torch.cat(parts, dim=1) for parts in zip(*sweeps, strict=True))
    return Quantized(codes, scales, zeros, errors, factor.damping)


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Factorize the damped Hessian as R R^T.

    Raises:
        CompressionError: Cholesky fails even when the damping is many times the mean diagonal.
    """
    factor = damped_cholesky(hessian, damping)
    return Factor(forward(factor.reversed_unit), factor.pivots.square().float(), factor.shift, factor.damping)


class _Sweep:
    """The passes over the columns for all levels of some rows.

    Buffers are laid out [columns, levels, rows], so that a column of all levels and rows is contiguous. ``panel`` holds
    for columns to come the weights plus what columns done have fed back, for columns done the deviation w - q.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        bits: Tensor,
        group: int,
        symmetric: bool,
        order: Tensor | None,
        block_size: int,
        clip_search: bool,
        scale_dtype: torch.dtype,
    ) -> None:
        rows, columns = weight.shape
        levels, groups, device = len(bits), columns // group, weight.device
        self.factor, self.group, self.order = factor, group, order
        self.symmetric, self.clip_search, self.scale_dtype = symmetric, clip_search, scale_dtype
        self.highest = highest_codes(bits.to(device))[:, None]
        self.highest_by_row = self.highest.expand(levels, rows).contiguous()
        self.scales = torch.empty(groups, levels, rows, device=device)
        self.inverse_scales, self.zeros = torch.empty_like(self.scales), torch.empty_like(self.scales)
        self.original = weight.t().contiguous()
        self.group_of = [column // group for column in range(columns)]
        if order is not None:
            self._fit_groups()
            self.original = self.original[order]
            self.group_of = [self.group_of[column] for column in order.tolist()]
        self.panel = self.original[:, None].repeat(1, levels, 1)
        self.codes = torch.empty(columns, levels, rows, dtype=torch.uint8, device=device)
        self.losses = torch.zeros(levels, rows, device=device)
        self.rounded, self.error = torch.empty_like(self.losses), torch.empty_like(self.losses)
        self.curvature = factor.curvature.tolist()
        self.block_size = block_size
        self.chunks = _chunks(block_size, None if order is not None else group)

    def run(self, descent: Descent | None, passes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and errors, in the layout of `Quantized`, after as many further ``passes``."""
        sweep_columns(
            self.panel.view(len(self.panel), -1), self.factor.feedback, self.chunks, self._quantize_column, self._reach
        )
        if descent:
            for _ in range(passes):
                self._refit(descent)
                descent.run(self.original, self.panel, self._round, self.block_size)
            errors = descent.errors(self.panel)
        else:
            # The sum of R_jj^2 e_j^2 is the error under the damped Hessian; the damping's share is taken off again.
            damped = self.losses.double()
            errors = (damped - self.factor.shift * self.panel.square_().sum(0).double()).clamp(min=0.0)
        codes = self.codes if self.order is None else self.codes[torch.argsort(self.order)]
        return (
            _inputs_last(codes),
            _inputs_last(self.scales.to(self.scale_dtype)),
            _inputs_last(self.zeros.byte()),
            errors,
        )

    def _reach(self, width: int, begin: int, end: int) -> None:
        """Fit the grid of a group that begins, unless all were fitted beforehand."""
        if width == self.group and self.order is None:
            self._fit_group(begin // width, self._compensated(begin, end), self.factor.curvature[begin:end])

    def _quantize_column(self, column: int) -> None:
        error = self.error
        rounded = self._round(column, self.panel[column])
        torch.sub(self.panel[column], rounded, out=error)
        self.losses.addcmul_(error, error, value=self.curvature[column])
        torch.sub(self.original[column], rounded, out=self.panel[column])

    def _round(self, column: int, values: Tensor) -> Tensor:
        """What the grids make of the ``values`` [levels, rows] of a column; its codes are kept."""
        group, rounded = self.group_of[column], self.rounded
        torch.addcmul(self.zeros[group], values, self.inverse_scales[group], out=rounded)
        torch.minimum(rounded.round_().clamp_(min=0.0), self.highest_by_row, out=rounded)
        self.codes[column].copy_(rounded)
        return rounded.sub_(self.zeros[group]).mul_(self.scales[group])

    def _refit(self, descent: Descent) -> None:
        """Fit the scale of each group to its codes."""
        order = torch.arange(len(self.panel), device=self.panel.device) if self.order is None else self.order
        for group, own in enumerate(torch.argsort(order).view(-1, self.group)):
            part = self.codes[own].float().sub_(self.zeros[group]).mul_(self.scales[group])
            self.scales[group] = descent.refit(self.panel, own, part, self.scales[group], self._stored)
            torch.reciprocal(self.scales[group], out=self.inverse_scales[group])

    def _stored(self, scales: Tensor) -> Tensor:
        """Scales as their type holds them; NaN where they are too small for it."""
        return scales.masked_fill(scales < SMALLEST_SCALES[self.scale_dtype], math.nan).to(self.scale_dtype).float()

    def _compensated(self, begin: int, end: int) -> Tensor:
        """What GPTQ holds for a group when it reaches it: weights that undo all earlier deviations if left unrounded.

        The panel is not it: there, a column lacks what the unrounded columns before it in the group would feed back.
        """
        original = self.original[begin:end, None]
        if begin == 0:  # nothing deviates yet
            return original
        fed_back = (self.panel[begin:end] - original).flatten(1)
        lower = self.factor.feedback[begin:end, begin:end].t()
        changes = torch.linalg.solve_triangular(lower, fed_back, upper=False, unitriangular=True)
        return original + changes.view_as(self.panel[begin:end])

    def _fit_groups(self) -> None:
        """Fit all grids to the original weights in their original order."""
        assert self.order is not None
        importance = self.factor.curvature[torch.argsort(self.order)]
        for index, (values, weights) in enumerate(
            zip(self.original.split(self.group), importance.split(self.group), strict=True)
        ):
            self._fit_group(index, values[:, None], weights)

    def _fit_group(self, index: int, values: Tensor, importance: Tensor) -> None:
        grid = fit_grid(
            values,
            self.highest,
            symmetric=self.symmetric,
            importance=importance,
            clip_search=self.clip_search,
            scale_dtype=self.scale_dtype,
        )
        self.scales[index], self.zeros[index] = grid.scales, grid.zeros
        torch.reciprocal(grid.scales, out=self.inverse_scales[index])


def _inputs_last(tensor: Tensor) -> Tensor:
    """[inputs, levels, rows] to [levels, rows, inputs], as the transpose of a matrix: torch copies that in tiles."""
    return tensor.flatten(1).t().contiguous().view(*tensor.shape[1:], len(tensor))


def _chunks(block_size: int, group: int | None) -> list[int]:
    """Widths of nested chunks, wide to narrow, ending in 1; a group whose grid is fitted underway is one of them."""
    if group is None:
        widths = [block_size, INNER_CHUNK, 1]
    elif group >= block_size:
        widths = [group, block_size, INNER_CHUNK, 1]
    else:
        widths = [block_size // group * group, group, INNER_CHUNK, 1]
    narrower = [widths[0]]
    for width in widths[1:]:
        if width < narrower[-1]:
            narrower.append(width)
    return narrower
