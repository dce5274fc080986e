"""Choose the grids of GGUF types: steps and minima as the type stores them, with the least weighted squared error.

For each group of weights x with importances w and fixed values v of its codes, the error of a step s and an offset o

    E(s, o) = sum w (x - s v - o)^2

is a quadratic form of six sums. Ranges of several widths are tried first, each with the best s and o for the codes that
it gives. Then the numbers that are stored are improved in turn, each exactly, while codes follow by rounding: d and
dmin (float16) for the integer scales and minima, and these for d and dmin.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from evopress.compression.formats.gguf import Grids, values_of
from evopress.compression.gguf_types import GgufGrid, GgufType
from evopress.util.errors import CompressionError

_RANGES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of the range of a group that are tried as the range of its grid."""
_ENDS = (0.0, 0.5, 1.0)
"""Of a grid with an offset: how much of what is cut off the range is cut off at its low end."""
_FINE = 64
"""With more values than this, the range is taken as it is: to clip it gains nothing."""
_REFINEMENTS = 2
"""Times that the best range is fitted anew to the codes that it gives."""
_ROUNDS = 3
"""Times that codes and stored numbers are improved in turn."""
_WEIGHTS_AT_ONCE = 2**20
"""Weights that are fitted at once, so that what is read over and over stays near the processor."""
_LEAST_IMPORTANCE = 1e-6
"""Of the mean: groups of dead inputs still get a grid."""
_TINY = 1e-30


def fit_grids(weight: Tensor, importance: Tensor, kind: GgufType) -> Grids:
    """Grids of a type for all rows of a weight.

    Args:
        weight: [rows, columns], float32; whole blocks of the type.
        importance: cost of a squared error at each input, [columns].
        kind: a type that has a grid.

    Raises:
        CompressionError: a weight is too large for float16 steps.
    """
    height = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    parts = [_Fit(rows, importance, kind).run() for rows in weight.split(height)]

    def joined(name: str) -> Tensor | None:
        """A part of the grids, of all rows; None where the type has none."""
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    step = joined("step")
    assert step is not None
    grids = Grids(step, joined("offset"), joined("scales"), joined("minima"))
    if not all(bool(torch.isfinite(half).all()) for half in (grids.step, grids.offset) if half is not None):
        raise CompressionError(f"a weight is too large for the float16 steps of {kind.name}; exclude the layer")
    return grids


def nearest_values(scaled: Tensor, grid: GgufGrid) -> Tensor:
    """The values of the grid nearest to ``scaled``, which is overwritten."""
    if grid.is_linear:
        return scaled.round_().clamp_(grid.values[0], grid.values[-1])
    return values_of(nearest_codes(scaled, grid), grid)


def nearest_codes(scaled: Tensor, grid: GgufGrid) -> Tensor:
    """Codes (uint8) of the values of the grid nearest to ``scaled``, which is overwritten."""
    lowest, highest = grid.values[0], grid.values[-1]
    if grid.is_linear:
        return scaled.round_().clamp_(lowest, highest).sub_(lowest).to(torch.uint8)
    halves = scaled.mul_(2).floor_().clamp_(2 * lowest, 2 * highest - 1).sub_(2 * lowest).int()
    return _codes_of_halves(grid, scaled.device).index_select(0, halves.flatten()).view_as(scaled)


@cache
def _codes_of_halves(grid: GgufGrid, device: torch.device) -> Tensor:
    """Nearest codes for each half step from the lowest value to the highest, as values are integers.

    To look a code up is many times faster than to search for it among the values.
    """
    values = torch.tensor(grid.values, dtype=torch.float32)
    middles = torch.arange(2 * grid.values[0], 2 * grid.values[-1]) / 2 + 0.25
    return (middles[:, None] - values).abs().argmin(1).to(torch.uint8).to(device)


class _Line(NamedTuple):
    """What decodes a group: weight = value x step + offset; each [rows, groups]."""

    step: Tensor
    offset: Tensor


class _Nested(NamedTuple):
    """Lines as types with blocks of several groups store them, in float32; minima and dmin are 0 where it has none."""

    d: Tensor
    dmin: Tensor
    """Both [rows, blocks]."""
    scales: Tensor
    minima: Tensor
    """Both [rows, blocks, groups of a block]."""

    def line(self) -> _Line:
        """Steps and offsets that the numbers stand for, [rows, groups]."""
        return _Line((self.d[..., None] * self.scales).flatten(1), -(self.dmin[..., None] * self.minima).flatten(1))


class _Sums(NamedTuple):
    """What the error of a group depends on, for given codes: weighted sums over its inputs, each [rows, groups]."""

    one: Tensor
    x: Tensor
    v: Tensor
    xv: Tensor
    vv: Tensor

    def gain(self, line: _Line) -> Tensor:
        """By how much the error is less than that of zeros."""
        step, offset = line
        return step * (2 * self.xv - step * self.vv - 2 * offset * self.v) + offset * (2 * self.x - offset * self.one)

    def best_step(self) -> Tensor:
        """Of lines without an offset, the one with the least error."""
        return self.xv / self.vv.clamp(min=_TINY)

    def best(self) -> _Line:
        """The line with the least error."""
        step, offset = _solve(self.vv, self.v, self.one, self.xv, self.x)
        flat = step.isnan()
        return _Line(step.masked_fill(flat, 0.0), torch.where(flat, self.x / self.one, offset))


class _Fit:
    """The grids of some rows. Weights are laid out [inputs of a group, rows, groups]."""

    def __init__(self, weight: Tensor, importance: Tensor, kind: GgufType) -> None:
        self.grid = _grid(kind)
        self.has_offset = self.grid.offset is not None
        self.groups = kind.block // self.grid.group
        self.x = weight.unflatten(1, (-1, self.grid.group)).permute(2, 0, 1).contiguous()
        relative = (importance / importance.mean().clamp(min=_TINY)).clamp(min=_LEAST_IMPORTANCE)
        self.w = relative.unflatten(0, (-1, self.grid.group)).t()[:, None]
        self.wx = self.w * self.x
        self.one, self.sum_x = self.w.sum(0).expand(self.x.shape[1:]), self.wx.sum(0)

    def run(self) -> Grids:
        """The grids, [rows, ...]."""
        line = self._free()
        if not self.grid.is_nested:
            return Grids(line.step.half(), line.offset.half() if self.has_offset else None, None, None)
        d, dmin, scales, minima = self._nested(line)
        shorts = scales.to(torch.int16), minima.to(torch.int16)
        return Grids(
            d.half(), dmin.half() if self.has_offset else None, shorts[0], shorts[1] if self.has_offset else None
        )

    def _free(self) -> _Line:
        """The best line of each group, made of any numbers."""
        candidates = iter(self._ranges())
        best = self._refitted(next(candidates))
        for start in candidates:
            best = _better(self._refitted(start), best)
        line = best[0]
        for _ in range(_REFINEMENTS):
            line, _gain = self._refitted(line)
        return line

    def _refitted(self, line: _Line) -> tuple[_Line, Tensor]:
        """The best line for the codes that a line gives, and what it gains."""
        sums = self._sums(line)
        best = self._best(sums)
        return best, sums.gain(best)

    def _best(self, sums: _Sums) -> _Line:
        """The best line that the type may have: without an offset, or with one of at most 0 where it has minima."""
        alone = _Line(sums.best_step(), torch.zeros_like(sums.xv))
        if not self.has_offset:
            return alone
        line = sums.best()
        if not self.grid.is_nested:
            return line
        positive = line.offset > 0
        return _Line(*(torch.where(positive, old, new) for old, new in zip(alone, line, strict=True)))

    def _ranges(self) -> Iterator[_Line]:
        """Lines to start from."""
        shares = _RANGES if len(self.grid.values) <= _FINE else (1.0,)
        lowest, highest = self.grid.values[0], self.grid.values[-1]
        low, high = self.x.amin(0), self.x.amax(0)
        if self.has_offset:
            low = low.clamp(max=0.0) if self.grid.is_nested else low
            span = high - low
            for share in shares:
                for end in _ENDS:
                    yield _Line(span * (share / (highest - lowest)), low + span * ((1 - share) * end))
            return
        extreme, none = torch.where(-low > high, low, high), torch.zeros_like(low)
        for share in shares:
            yield _Line(extreme * (share / lowest), none)
            yield _Line(extreme * (share / highest), none)

    def _sums(self, line: _Line) -> _Sums:
        inverse = torch.where(line.step == 0, 0.0, 1 / line.step)
        values = nearest_values((self.x - line.offset).mul_(inverse), self.grid)
        weighted = self.w * values
        xv = (self.wx * values).sum(0)
        return _Sums(self.one, self.sum_x, weighted.sum(0), xv, weighted.mul_(values).sum(0))

    def _nested(self, line: _Line) -> _Nested:
        """The numbers from which a type with scales, and perhaps minima, makes lines that come near these."""
        lowest, highest = self.grid.scale_values
        steps = self._by_block(line.step)
        extreme = steps.gather(2, steps.abs().argmax(2, keepdim=True))[..., 0]
        d = _half(extreme / (lowest or highest))
        dmin = _half(self._by_block(line.offset).amin(2) / -highest)
        nested = self._with_integers(self._sums(line), d, dmin)
        for _ in range(_ROUNDS):
            sums = self._sums(nested.line())
            nested = self._with_integers(sums, *self._halves(sums, nested))
        return nested

    def _with_integers(self, sums: _Sums, d: Tensor, dmin: Tensor) -> _Nested:
        """The best scales and minima for given codes and given d and dmin."""
        lowest, highest = self.grid.scale_values
        inner, outer = (tensor.repeat_interleave(self.groups, dim=1) for tensor in (d, dmin))
        nearest = torch.where(inner == 0, 0.0, self._best(sums).step / inner).round()

        def candidate(shift: int) -> tuple[_Line, Tensor]:
            """Scales that far from the nearest ones with their best minima, and what they gain."""
            scale = (nearest + shift).clamp(lowest, highest)
            wanted = (scale * inner * sums.v - sums.x) / sums.one
            minimum = torch.where(outer == 0, 0.0, wanted / outer).round().clamp(0, highest)
            return _Line(scale, minimum), sums.gain(_Line(scale * inner, -minimum * outer))

        best = candidate(0)
        for shift in (-1, 1):
            best = _better(candidate(shift), best)
        return _Nested(d, dmin, self._by_block(best[0].step), self._by_block(best[0].offset))

    def _halves(self, sums: _Sums, nested: _Nested) -> tuple[Tensor, Tensor]:
        """The best d and dmin for given codes, scales and minima; the old ones where float16 makes those better."""

        def total(of_groups: Tensor) -> Tensor:
            """Sums over the groups of each block, [rows, blocks]."""
            return self._by_block(of_groups).sum(2)

        scale, minimum = nested.scales.flatten(1), nested.minima.flatten(1)
        xv, vv = total(sums.xv * scale), total(sums.vv * scale.square())
        d, dmin = xv / vv.clamp(min=_TINY), nested.dmin
        if self.has_offset:
            v, one = total(-sums.v * scale * minimum), total(sums.one * minimum.square())
            solved = _solve(vv, v, one, xv, total(-sums.x * minimum))
            d, dmin = (torch.where(new.isnan(), old, new) for new, old in zip(solved, nested[:2], strict=True))
        d, dmin = _half(d), _half(dmin)
        better = total(sums.gain(nested._replace(d=d, dmin=dmin).line())) > total(sums.gain(nested.line()))
        return torch.where(better, d, nested.d), torch.where(better, dmin, nested.dmin)

    def _by_block(self, of_groups: Tensor) -> Tensor:
        return of_groups.unflatten(1, (-1, self.groups))


def _better(new: tuple[_Line, Tensor], old: tuple[_Line, Tensor]) -> tuple[_Line, Tensor]:
    """For each group, the line with the larger gain, and that gain."""
    better = new[1] > old[1]
    line = _Line(*(torch.where(better, ours, theirs) for ours, theirs in zip(new[0], old[0], strict=True)))
    return line, torch.where(better, new[1], old[1])


def _solve(a: Tensor, b: Tensor, c: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Solve [[a, b], [b, c]] (p, q) = (first, second); NaN where that is singular within float32."""
    determinant = a * c - b * b
    determinant = torch.where(determinant > 1e-6 * a * c, determinant, math.nan)
    return (c * first - b * second) / determinant, (a * second - b * first) / determinant


def _half(tensor: Tensor) -> Tensor:
    return tensor.half().float()


def _grid(kind: GgufType) -> GgufGrid:
    if kind.grid is None:
        raise CompressionError(f"{kind.name} takes its weights from codebooks and has no grid; use `rounding: rtn`")
    return kind.grid
