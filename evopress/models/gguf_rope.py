"""Rotary positions as a GGUF file describes them, as transformers' `rope_parameters`.

llama.cpp keeps one part in the header (`rope.freq_base`, `rope.scaling.*`), and another as tensors of factors by which
the angle of each frequency is divided.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from evopress.util.errors import UnsupportedArchitectureError

BASE = 10_000.0
"""What llama.cpp takes where the file gives no `rope.freq_base`."""
LLAMA3 = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (LLAMA3, LONG, SHORT)
_TOLERANCE = 1e-4
"""Of a factor: those that are stored are float32, and some converters work in float16."""
_LOW, _HIGH = 1.0, 4.0
"""Of every Llama 3.x; only the ratio of each to the original length can be told from the factors."""


def scaling(keys: dict[str, Any], context: int) -> dict[str, Any]:
    """`rope_parameters` of what the header says under `rope.scaling.*`; takes the keys it honours from ``keys``.

    Args:
        keys: of the header, without the architecture's name before them.
        context: positions that the model has.

    Raises:
        UnsupportedArchitectureError: a kind of scaling that has no counterpart.
    """
    kind = keys.pop("rope.scaling.type", "linear")  # linear unless said otherwise, as in llama.cpp
    factor = keys.pop("rope.scaling.factor", 0.0) or keys.get("rope.scale_linear", 0.0)
    keys.pop("rope.scale_linear", None)
    if kind == "yarn":
        return _yarn(keys, factor, context)
    if kind not in ("none", "linear"):
        raise UnsupportedArchitectureError(f"rope.scaling.type: {kind!r} is not supported, or lacks its factors")
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "default"}


def _yarn(keys: dict[str, Any], factor: float, context: int) -> dict[str, Any]:
    if not factor:
        raise UnsupportedArchitectureError("rope.scaling.factor: is missing, and rope.scaling.type is yarn")
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.pop("rope.scaling.original_context_length", context),
    }
    for name in ("beta_fast", "beta_slow"):
        if (value := keys.pop(f"rope.scaling.yarn_{name}", None)) is not None:
            found[name] = value
    if (times := keys.pop("rope.scaling.attn_factor", 1.0)) != 1.0:
        found["attention_factor"] = times * (0.1 * math.log(factor) + 1.0)
    return found


def from_factors(factors: Sequence[float], base: float, context: int) -> dict[str, Any]:
    """`rope_parameters` that divide the angle of each frequency by its factor, as `rope_freqs.weight` asks.

    That tensor is what converters make of Llama 3's scaling, so that is looked for first. Where the factors are none of
    that kind, they are given one by one, as LongRoPE does, alike for all lengths.

    Args:
        factors: one per frequency, from the highest.
        base: of the frequencies, `rope_theta`.
        context: positions that the model has.
    """
    given = torch.tensor(factors, dtype=torch.float64)
    if torch.allclose(given, torch.ones_like(given), rtol=_TOLERANCE):
        return {"rope_type": "default"}
    turns = base ** -(torch.arange(len(given), dtype=torch.float64) / len(given)) / (2 * math.pi)
    largest = round(float(given.max()), 4)
    for length in _possible_lengths(given, turns, largest):
        if torch.allclose(_llama3(turns, largest, length), given, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": length,
            }
    listed = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _possible_lengths(factors: torch.Tensor, turns: torch.Tensor, largest: float) -> list[int]:
    """Original lengths that the factors between 1 and the largest allow, and the one of every Llama 3.x."""
    between = (factors > 1 + _TOLERANCE) & (factors < largest * (1 - _TOLERANCE))
    share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    lengths = (share * (_HIGH - _LOW) + _LOW) / turns[between]
    return [8192, *(round(length) for length in lengths.tolist())]


def _llama3(turns: torch.Tensor, largest: float, length: int) -> torch.Tensor:
    """Factors of Llama 3's scaling; ``turns`` are those of each frequency per position."""
    share = ((length * turns - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
    return 1 / (share + (1 - share) / largest)
