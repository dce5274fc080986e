"""Rounding weights onto the grids of GGUF types: with the error feedback of GPTQ, or each weight to the nearest."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from evopress.compression.cholesky import INNER_CHUNK, sweep_columns
from evopress.compression.descent import Descent
from evopress.compression.formats.gguf import GgufFormat, encode, values_of
from evopress.compression.gguf_grids import fit_grids, nearest_codes
from evopress.compression.gguf_types import GgufType
from evopress.compression.gptq import Factor, factorize
from evopress.util.errors import CompressionError

# GPTQ on the grids of GGUF types: error feedback between columns whose integer scales and minima are fixed beforehand.


@dataclass(frozen=True)
class GgufQuantized:
    """A linear layer in a GGUF type."""

    blocks: Tensor
    """uint8 [rows, bytes of a row], as a GGUF file stores them."""
    errors: Tensor
    """Rows of tr(dW H dW^T), with the Hessian as given (no damping); float64 [rows]."""
    damping: float
    """Damping with which Cholesky succeeded."""


def gguf_gptq(
    weight: Tensor,
    hessian: Tensor,
    kinds: Sequence[GgufType],
    activation_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    rows_at_once: int | None = None,
    passes: int = 0,
) -> list[GgufQuantized]:
    """Quantize a linear layer to several types, compensating each column's error in the columns after it.

    Args:
        weight: finite weights [rows, columns].
        hessian: X^T X of the layer's inputs, [columns, columns].
        kinds: types with a grid, whose blocks divide the columns.
        activation_order: visit columns by decreasing Hessian diagonal.
        damping: share of the mean Hessian diagonal added to the diagonal; raised tenfold while Cholesky fails.
        block_size: columns between two updates by the columns of all earlier blocks.
        rows_at_once: rows per sweep, to bound memory (about 8 bytes x types x rows x columns); None is all.
        passes: over the columns after GPTQ's own, each with d and dmin of all blocks fitted anew and every column
            rounded again, given all others; the integer scales and minima stay. They hold two more matrices as large as
            the Hessian, and two to three times the memory per row.

    Raises:
        CompressionError: Cholesky fails at any damping, a type has no grid, or a weight is beyond float16 steps.
    """
    dead = hessian.diagonal() == 0
    order = torch.arange(len(hessian), device=hessian.device)
    if activation_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    visited = hessian[order][:, order] if activation_order else hessian
    factor = factorize(visited, damping)
    descent = Descent(visited, factor.shift) if passes else None
    live = weight.float().masked_fill(dead, 0.0)
    parts = [
        _Sweep(rows, factor, kinds, order, dead, block_size).run(descent, passes)
        for rows in live.split(rows_at_once or len(live))
    ]
    return [
        GgufQuantized(torch.cat([b for b, _ in of_kind]), torch.cat([e for _, e in of_kind]), factor.damping)
        for of_kind in zip(*parts, strict=True)
    ]


class _Sweep:
    """The passes over the columns for all types of some rows.

    Buffers are laid out [columns, types, rows], in the order in which columns are visited, so that a column of all
    types and rows is contiguous. ``panel`` holds for columns to come the weights plus what columns done have fed back,
    for columns done the deviation w - q.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        kinds: Sequence[GgufType],
        order: Tensor,
        dead: Tensor,
        block_size: int,
    ) -> None:
        rows, columns, device = *weight.shape, weight.device
        self.factor, self.kinds, self.order, self.block_size = factor, kinds, order, block_size
        importance = torch.empty_like(factor.curvature)
        importance[order] = factor.curvature
        self.grids = [fit_grids(weight, importance.masked_fill(dead, 0.0), kind) for kind in kinds]
        self._spread_grids(columns)
        self.original = weight.t()[order].contiguous()
        self.panel = self.original[:, None].repeat(1, len(kinds), 1)
        self.codes = torch.empty(columns, len(kinds), rows, dtype=torch.uint8, device=device)
        self.losses = torch.zeros(len(kinds), rows, device=device)
        self.error, self.scaled, self.rounded = (torch.empty_like(self.losses) for _ in range(3))
        self.curvature = factor.curvature.tolist()
        # A dead input counts as 1 on the diagonal of the factorized Hessian.
        self.added = factor.shift + dead[order].float()

    def _spread_grids(self, columns: int) -> None:
        """Steps and offsets of all types, for each of their smallest groups: [groups, types, rows]."""
        grids = [kind.grid for kind in self.kinds if kind.grid]
        self.fine = min(grid.group for grid in grids)
        spread = []
        for stored, grid in zip(self.grids, grids, strict=True):
            steps, offsets = stored.steps(), stored.offsets()
            offsets = torch.zeros_like(steps) if offsets is None else offsets
            times = grid.group // self.fine
            spread.append([tensor.t().repeat_interleave(times, 0) for tensor in (steps, offsets)])
        self.steps, self.offsets = (torch.stack(tensors, 1) for tensors in zip(*spread, strict=True))
        self.inverse = torch.where(self.steps == 0, 0.0, self.steps.reciprocal())
        shape, device = self.steps.shape[1:], self.steps.device
        ends = torch.tensor([[grid.values[0], grid.values[-1]] for grid in grids], dtype=torch.float32, device=device)
        self.lowest, self.highest = (ends[:, end, None].expand(shape).contiguous() for end in (0, 1))
        self.group_of = (self.order // self.fine).tolist()
        self.nonlinear = [(index, grid) for index, grid in enumerate(grids) if not grid.is_linear]

    def run(self, descent: Descent | None, passes: int) -> list[tuple[Tensor, Tensor]]:
        """Blocks and errors of the rows, for each type, after as many further ``passes``."""
        widths = [self.block_size, INNER_CHUNK, 1]
        sweep_columns(self.panel.view(len(self.panel), -1), self.factor.feedback, widths, self._quantize_column)
        if descent:
            for _ in range(passes):
                self._refit(descent)
                descent.run(self.original, self.panel, self._round, self.block_size)
            errors = descent.errors(self.panel)
        else:
            # The sum of R_jj^2 e_j^2 is the error under the factorized Hessian; what was added to it is taken off.
            surplus = (self.added @ self.panel.square_().flatten(1)).view_as(self.losses)
            errors = (self.losses.double() - surplus.double()).clamp_(min=0.0)
        codes = self.codes[torch.argsort(self.order)]
        return [
            (encode(codes[:, index].t().contiguous(), self.grids[index], kind)["blocks"], errors[index])
            for index, kind in enumerate(self.kinds)
        ]

    def _quantize_column(self, column: int) -> None:
        target = self.panel[column]
        values = self._round(column, target)
        torch.sub(target, values, out=self.error)
        self.losses.addcmul_(self.error, self.error, value=self.curvature[column])
        torch.sub(self.original[column], values, out=target)

    def _round(self, column: int, target: Tensor) -> Tensor:
        """What the types make of the weights ``target`` [types, rows] of a column; its codes are kept."""
        group, values = self.group_of[column], self.rounded
        torch.sub(target, self.offsets[group], out=self.scaled).mul_(self.inverse[group])
        torch.round(self.scaled, out=values).clamp_(self.lowest, self.highest)
        self.codes[column].copy_(torch.sub(values, self.lowest, out=self.error))
        for index, grid in self.nonlinear:
            self.codes[column, index] = nearest_codes(self.scaled[index], grid)
            values[index] = values_of(self.codes[column, index], grid)
        return values.mul_(self.steps[group]).add_(self.offsets[group])  # as weights are decoded, to the last bit

    def _refit(self, descent: Descent) -> None:
        """Fit d, then dmin, of each block to its codes."""
        positions = torch.argsort(self.order)
        for index, kind in enumerate(self.kinds):
            of_type = slice(index, index + 1)
            step, offset = self.grids[index].step, self.grids[index].offset
            for block, own in enumerate(positions.view(-1, kind.block)):
                offsets = self.offsets[self.order[own] // self.fine, of_type]
                scaled = self.original[own, None] - self.panel[own, of_type] - offsets
                for half, part in ((step, scaled), (offset, offsets)):
                    if half is not None:
                        number = half[:, block].float()[None]
                        number = descent.refit(self.panel[:, of_type], own, part, number, _half)
                        half[:, block] = number[0]
        self._spread_grids(len(self.order))


def _half(numbers: Tensor) -> Tensor:
    return numbers.half().float()


# Rounding to the nearest of what a GGUF type can hold, by the library `libgguf`: the quantizers of llama.cpp.

_LEAST_IMPORTANCE = 1e-6
"""Of the mean: a block of inputs that are all dead still gets a scale."""


def gguf_rtn(weight: Tensor, hessian: Tensor, kinds: Sequence[GgufType]) -> list[GgufQuantized]:
    """Round a linear layer to several types, where inputs count as much as their Hessian diagonal.

    Args:
        weight: finite weights [rows, columns].
        hessian: X^T X of the layer's inputs, [columns, columns].
        kinds: types whose blocks divide the columns.

    Raises:
        CompressionError: libgguf is not installed.
    """
    importance = hessian.diagonal() / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    importance = importance.clamp(min=_LEAST_IMPORTANCE)
    results = []
    for kind in kinds:
        blocks = round_to_nearest(weight, importance, kind).to(weight.device)
        rounded = GgufFormat(kind).decode({"blocks": blocks}, (weight.shape[0], weight.shape[1]), torch.float32)
        deviation = rounded.sub_(weight)
        errors = torch.einsum("rc,rc->r", deviation @ hessian.float(), deviation).double()
        results.append(GgufQuantized(blocks, errors, damping=0.0))
    return results


def round_to_nearest(weight: Tensor, importance: Tensor, kind: GgufType) -> Tensor:
    """Blocks (uint8 [rows, bytes of a row], on the CPU) of a weight [rows, columns] with these importances [columns].

    Raises:
        CompressionError: libgguf is not installed.
    """
    if find_spec("libgguf") is None:
        raise CompressionError(
            "rounding to the nearest GGUF type needs libgguf: pip install -e '.[gguf]', or choose `rounding: gptq`"
        )
    import libgguf

    number, counts = libgguf.GGMLQuantizationType[kind.name], importance.float().cpu().numpy()

    def rounded(rows: Tensor) -> Tensor:
        """Blocks of some rows [n, columns]."""
        return torch.from_numpy(libgguf.quantize_rows(rows.numpy(), number, counts))

    rows = weight.float().cpu()
    rounded(rows[:1])  # makes the tables of types with codebooks, once, before several threads read them
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # rows do not depend on each other, and libgguf leaves Python alone
        return torch.cat(list(pool.map(rounded, rows.split(-(-len(rows) // threads)))))
