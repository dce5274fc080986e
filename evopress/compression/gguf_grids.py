"""Choose the grids of GGUF types: steps and minima as the type stores them, with the least weighted squared error.

For each group of weights x with importances w and fixed values v of its codes, the error of a step s and an offset o

    E(s, o) = sum w (x - s v - o)^2

is a quadratic form of six sums. Ranges of several widths are tried first, each with the best s and o for the codes that
it gives. Then the numbers that are stored are improved in turn, each exactly, while codes follow by rounding: d and
dmin (float16) for the integer scales and minima, and these for d and dmin.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compression.formats.gguf import Grids
from evopress.compression.gguf_types import GgufType, Grid
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
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    step = joined("step")
    assert step is not None
    grids = Grids(step, joined("offset"), joined("scales"), joined("minima"))
    if not all(bool(torch.isfinite(half).all()) for half in (grids.step, grids.offset) if half is not None):
        raise CompressionError(f"a weight is too large for the float16 steps of {kind.name}; exclude the layer")
    return grids


def nearest_values(scaled: Tensor, grid: Grid) -> Tensor:
    """The values of the grid nearest to ``scaled``, which is overwritten."""
    if grid.is_linear:
        return scaled.round_().clamp_(grid.values[0], grid.values[-1])
    values = torch.tensor(grid.values, dtype=torch.float32, device=scaled.device)
    return values[torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)]


@dataclass(frozen=True)
class _Sums:
    """What the error of a group depends on, for given codes: weighted sums over its inputs, each [rows, groups]."""

    one: Tensor
    x: Tensor
    v: Tensor
    xv: Tensor
    vv: Tensor

    def gain(self, step: Tensor, offset: Tensor | float) -> Tensor:
        """By how much the error is less than that of zeros."""
        return step * (2 * self.xv - step * self.vv - 2 * offset * self.v) + offset * (2 * self.x - offset * self.one)

    def best(self, with_offset: bool, at_most_zero: bool) -> tuple[Tensor, Tensor | float]:
        """Step and offset with the least error."""
        alone = self.xv / self.vv.clamp(min=_TINY)
        if not with_offset:
            return alone, 0.0
        determinant = self.one * self.vv - self.v * self.v
        solvable = determinant > 1e-6 * self.one * self.vv
        safe = torch.where(solvable, determinant, 1.0)
        step = torch.where(solvable, (self.one * self.xv - self.x * self.v) / safe, 0.0)
        offset = torch.where(solvable, (self.vv * self.x - self.v * self.xv) / safe, self.x / self.one)
        if at_most_zero:
            step, offset = torch.where(offset > 0, alone, step), offset.clamp(max=0.0)
        return step, offset


class _Fit:
    """The grids of some rows. Weights are laid out [inputs of a group, rows, groups]."""

    def __init__(self, weight: Tensor, importance: Tensor, kind: GgufType) -> None:
        self.kind, self.grid = kind, _grid(kind)
        self.has_offset = self.grid.offset is not None
        self.groups = kind.block // self.grid.group
        self.x = weight.unflatten(1, (-1, self.grid.group)).permute(2, 0, 1).contiguous()
        mean = importance.mean().clamp(min=_TINY)
        w = (importance / mean).clamp(min=1e-6).unflatten(0, (-1, self.grid.group)).t()[:, None]
        self.w, self.wx = w, w * self.x
        self.one, self.sum_x = w.sum(0).expand(self.x.shape[1:]), self.wx.sum(0)

    def run(self) -> Grids:
        """The grids, [rows, ...]."""
        step, offset = self._free()
        if not self.grid.is_nested:
            return Grids(step.half(), offset.half() if isinstance(offset, Tensor) else None, None, None)
        return self._nested(step, offset)

    def _free(self) -> tuple[Tensor, Tensor | float]:
        """Step and offset of each group, of any value."""
        best = None
        for low, step in self._ranges():
            sums = self._sums(step, low)
            candidate = sums.best(self.has_offset, self.grid.is_nested)
            gain = sums.gain(*candidate)
            if best is None:
                best, most = candidate, gain
                continue
            better = gain > most
            most = torch.where(better, gain, most)
            best = tuple(
                torch.where(better, new, old) if isinstance(new, Tensor) else new
                for new, old in zip(candidate, best, strict=True)
            )
        assert best is not None
        for _ in range(_REFINEMENTS):
            best = self._sums(*best).best(self.has_offset, self.grid.is_nested)
        return best

    def _ranges(self):
        """Offsets and steps to start from, [rows, groups]."""
        shares = _RANGES if len(self.grid.values) <= _FINE else (1.0,)
        lowest, highest = self.grid.values[0], self.grid.values[-1]
        low, high = self.x.amin(0), self.x.amax(0)
        if self.has_offset:
            low = low.clamp(max=0.0) if self.grid.is_nested else low
            span = high - low
            for share in shares:
                for part in _ENDS:
                    yield low + span * ((1 - share) * part), span * (share / (highest - lowest))
            return
        extreme = torch.where(-low > high, low, high)
        for share in shares:
            yield 0.0, extreme * (share / lowest)
            yield 0.0, extreme * (share / highest)

    def _values(self, step: Tensor, offset: Tensor | float) -> Tensor:
        """Values of the codes of all weights on these grids."""
        inverse = torch.where(step == 0, 0.0, 1 / step)
        return nearest_values((self.x - offset).mul_(inverse), self.grid)

    def _sums(self, step: Tensor, offset: Tensor | float) -> _Sums:
        values = self._values(step, offset)
        weighted = self.w * values
        return _Sums(
            self.one, self.sum_x, weighted.sum(0), (self.wx * values).sum(0), weighted.mul_(values).sum(0)
        )

    def _nested(self, step: Tensor, offset: Tensor | float) -> Grids:
        """The grids of a type whose groups have integer scales, and perhaps minima, within a block."""
        lowest, highest = self.grid.scale_values
        blocks = step.unflatten(1, (-1, self.groups))
        extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0]
        d = (extreme / (lowest or highest)).half().float()
        dmin = None
        if isinstance(offset, Tensor):
            dmin = (-offset.unflatten(1, (-1, self.groups)).amin(2) / highest).half().float()
        scales, minima = self._integers(self._sums(step, offset), d, dmin)
        for _ in range(_ROUNDS):
            sums = self._sums(*_effective(d, dmin, scales, minima))
            d, dmin = self._halves(sums, d, dmin, scales, minima)
            scales, minima = self._integers(sums, d, dmin)
        return Grids(
            d.half(),
            None if dmin is None else dmin.half(),
            scales.to(torch.int16),
            None if minima is None else minima.to(torch.int16),
        )

    def _integers(self, sums: _Sums, d: Tensor, dmin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The best scales and minima (float32 integers [rows, blocks, groups]) for given codes, d and dmin."""
        lowest, highest = self.grid.scale_values
        step, _ = sums.best(self.has_offset, True)
        inner = self._per_group(d)
        nearest = torch.where(inner == 0, 0.0, step / inner).round()
        best = None
        for shift in (0, -1, 1):
            scale = (nearest + shift).clamp(lowest, highest)
            minimum, offset = None, 0.0
            if dmin is not None:
                outer = self._per_group(dmin)
                wanted = (scale * inner * sums.v - sums.x) / sums.one
                minimum = torch.where(outer == 0, 0.0, wanted / outer).round().clamp(lowest, highest)
                offset = -minimum * outer
            gain = sums.gain(scale * inner, offset)
            if best is None:
                best, most = (scale, minimum), gain
                continue
            better = gain > most
            most = torch.where(better, gain, most)
            best = (
                torch.where(better, scale, best[0]),
                None if minimum is None else torch.where(better, minimum, best[1]),
            )
        scale, minimum = best
        shape = (-1, self.groups)
        return scale.unflatten(1, shape), None if minimum is None else minimum.unflatten(1, shape)

    def _per_group(self, of_block: Tensor) -> Tensor:
        return of_block.repeat_interleave(self.groups, dim=1)

    def _halves(
        self, sums: _Sums, d: Tensor, dmin: Tensor | None, scales: Tensor, minima: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The best d and dmin for given codes, scales and minima, rounded to float16; the old ones where those are better."""

        def total(of_group: Tensor) -> Tensor:
            return of_group.unflatten(1, (-1, self.groups)).sum(2)

        scale = scales.flatten(1)
        xv, vv = total(sums.xv * scale), total(sums.vv * scale.square())
        if dmin is None or minima is None:
            new, new_min = xv / vv.clamp(min=_TINY), None
        else:
            minimum = minima.flatten(1)
            v, x, one = total(sums.v * scale * minimum), total(sums.x * minimum), total(sums.one * minimum.square())
            determinant = vv * one - v * v
            solvable = determinant > 1e-6 * vv * one
            safe = torch.where(solvable, determinant, 1.0)
            new = torch.where(solvable, (one * xv - v * x) / safe, d)
            new_min = torch.where(solvable, (v * xv - vv * x) / safe, dmin).half().float()
        new = new.half().float()
        before = total(sums.gain(*_effective(d, dmin, scales, minima)))
        after = total(sums.gain(*_effective(new, new_min, scales, minima)))
        better = after > before
        return torch.where(better, new, d), None if dmin is None else torch.where(better, new_min, dmin)


def _effective(
    d: Tensor, dmin: Tensor | None, scales: Tensor, minima: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """Steps and offsets [rows, groups]."""
    step = (d[..., None] * scales).flatten(1)
    return step, 0.0 if dmin is None or minima is None else -(dmin[..., None] * minima).flatten(1)


def _grid(kind: GgufType) -> Grid:
    if kind.grid is None:
        raise CompressionError(f"{kind.name} takes its weights from codebooks and has no grid; use `rounding: rtn`")
    return kind.grid
