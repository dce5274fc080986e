"""Min-max quantization grids, fitted for several bit-widths at once.

A grid is a scale and an integer zero point per group of inputs and output row; code ``q`` stands for the weight
``(q - zero) * scale``. Scales are rounded to the type that stores them *before* anything is quantized with them, so
that unpacked weights are the very weights whose errors GPTQ has compensated. That is float16, or bfloat16 for runtimes
that hold scales in the type of a bfloat16 model: there, a float16 scale would be rounded once more.

Layers whose weights are in other units (tiny, where the norm before them is large) would have scales that float16
does not hold. They are quantized times a power of two, which changes no code, and their scales stored in float32.
The range of bfloat16 is that of float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.util.errors import CompressionError

SCALE_DTYPE = torch.float16
CLIP_RATIOS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of the min-max range that a clip search tries."""
_INPUTS_AT_ONCE = 256
"""Inputs whose rounding errors are held at once: those of a group as wide as the layer would outweigh the sweep."""
SMALLEST_SCALES = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
"""Of each type that stores scales: a group of zeros gets it, and decodes to exact zeros."""
_COARSE_SCALE = 2.0**-18
"""Float16 rounds smaller scales by more than one part in 2^8: with 8 bits, by more than a code of the range."""
_LARGE_SCALE = 2.0**14
"""Larger scales leave too little room below 65504 for what compensation adds to weights."""
_USUAL_SCALE = 2.0**8
"""What the largest scale of a layer becomes where the layer is multiplied: far from both ends of float16's range."""
_SHARE = 1e-4
"""Of a layer's output, what may rest on coarse scales: less than quantization to 7 bits takes."""
_MOST_OCTAVES = 120
"""Powers of two within the normal range of float32."""


@dataclass(frozen=True)
class Grid:
    """Grids of one group of inputs, for every level and row."""

    scales: Tensor
    """Float32 values that the type which stores them represents exactly, [levels, rows]."""
    zeros: Tensor
    """Zero points as float32 integers, [levels, rows]."""


def highest_codes(bits: Tensor) -> Tensor:
    """Highest code of each bit-width: 2^bits - 1 (float32, same shape)."""
    return (torch.ones_like(bits) << bits).float() - 1  # exp2 is off by a rounding on some devices


def scale_exponent(weight: Tensor, diagonal: Tensor, bits: Sequence[int], group: int) -> int:
    """The power of two by which to multiply a layer's weights so that float16 holds their scales.

    Zero wherever it holds them already: all scales are within its range, and those that it rounds coarsely belong to
    groups that hardly contribute to the output.

    Args:
        weight: [rows, columns], float32.
        diagonal: diagonal of the Hessian, [columns]: how much a squared weight contributes to the output.
        bits: bit-widths, the levels.
        group: inputs that share a scale.
    """
    grouped = weight.unflatten(1, (-1, group))
    span = grouped.amax(2).clamp(min=0.0) - grouped.amin(2).clamp(max=0.0)
    largest = float(span.max()) / (2 ** min(bits) - 1)
    if not 0 < largest < math.inf:
        return 0
    energy = span.double().square() * diagonal.double().unflatten(0, (-1, group)).sum(1)
    coarse = span < _COARSE_SCALE * (2 ** max(bits) - 1)
    if largest <= _LARGE_SCALE and float(energy[coarse].sum()) <= _SHARE * float(energy.sum()):
        return 0
    return max(-_MOST_OCTAVES, min(_MOST_OCTAVES, math.floor(math.log2(_USUAL_SCALE / largest))))


def fit_grid(
    values: Tensor,
    highest: Tensor,
    *,
    symmetric: bool,
    importance: Tensor | None = None,
    clip_search: bool = False,
    scale_dtype: torch.dtype = SCALE_DTYPE,
) -> Grid:
    """Fit grids to one group of weights.

    Args:
        values: weights [inputs of the group, levels, rows] (levels may be 1 and broadcast), float32.
        highest: highest code of each level, [levels, 1].
        symmetric: centre the grid on zero (zero point 2^(bits-1)); otherwise it spans min to max, zero included.
        importance: cost of a squared error at each input, [inputs of the group]; used by the clip search only.
        clip_search: choose the share of the range (`CLIP_RATIOS`) with the least weighted squared rounding error.
        scale_dtype: float16 or bfloat16, which stores the scales.

    Raises:
        CompressionError: a weight is too large for the scale.
    """
    low, high = values.amin(0).clamp(max=0.0), values.amax(0).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if not clip_search:
        return _span(low, high, highest, symmetric, scale_dtype)
    weight = torch.ones_like(values[:, 0, 0]) if importance is None else importance
    best = _span(low, high, highest, symmetric, scale_dtype)
    least = _rounding_error(values, best, highest, weight)
    for ratio in CLIP_RATIOS:
        grid = _span(low * ratio, high * ratio, highest, symmetric, scale_dtype)
        error = _rounding_error(values, grid, highest, weight)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    return best


def _rounding_error(values: Tensor, grid: Grid, highest: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of squared rounding errors over a group's inputs, [levels, rows]."""
    inverse, total = grid.scales.reciprocal(), torch.zeros_like(grid.scales)
    for part, share in zip(values.split(_INPUTS_AT_ONCE), weight.split(_INPUTS_AT_ONCE), strict=True):
        scaled = torch.addcmul(grid.zeros, part, inverse)
        residual = torch.round(scaled).clamp_(min=0.0)
        torch.minimum(residual, highest, out=residual).sub_(scaled).square_()
        total += (share @ residual.flatten(1)).view_as(total)
    return total * grid.scales.square()


def _span(low: Tensor, high: Tensor, highest: Tensor, symmetric: bool, dtype: torch.dtype) -> Grid:
    """Grid from ``low`` <= 0 to ``high`` >= 0 (each [levels, rows]) with scales that ``dtype`` holds."""
    scales = ((high - low) / highest).clamp(min=SMALLEST_SCALES[dtype]).to(dtype).float()
    if not bool(torch.isfinite(scales).all()):
        name = str(dtype).removeprefix("torch.")
        raise CompressionError(f"a weight is too large for a {name} scale; exclude the layer or take more bits")
    if symmetric:
        return Grid(scales, ((highest + 1) / 2).expand_as(scales))
    return Grid(scales, torch.round(-low / scales).clamp(min=0.0).minimum(highest))


def quantize(values: Tensor, grid: Grid, highest: Tensor) -> Tensor:
    """Codes (float32 integers) of ``values`` [..., levels, rows], rounded to nearest."""
    return torch.round(values / grid.scales + grid.zeros).clamp(min=0.0).minimum(highest)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Weights that ``codes`` [..., levels, rows] stand for."""
    return (codes - grid.zeros) * grid.scales
