"""Rotary positions as a GGUF file describes them: keys of the header, and factors that divide each frequency's angle.

The reverse of `evopress/models/gguf_rope.py`, which has the names.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from evopress.models.gguf_rope import LLAMA3, LONG, SHORT
from evopress.util.errors import UnsupportedArchitectureError

_HONOURED = {
    *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "long_factor", "short_factor"),
    *("low_freq_factor", "high_freq_factor"),
}
_TOLERANCE = 1e-6


def rope_keys(config: Any, scalings: Collection[str], head_size: int) -> dict[str, Any]:
    """Keys under `rope.`, without the architecture's name.

    Args:
        config: of transformers.
        scalings: kinds that llama.cpp's code for the architecture knows.
        head_size: numbers per attention head.

    Raises:
        UnsupportedArchitectureError: the positions are scaled in a way that llama.cpp does not know; it is named.
    """
    rope = rope_of(config)
    kind = rope["rope_type"]
    strange = sorted(key for key, value in rope.items() if key not in _HONOURED and value is not None)
    if kind not in scalings or strange:
        what = f"rope_parameters.{strange[0]}" if strange else f"rope_type {kind}"
        raise UnsupportedArchitectureError(
            f"{config.model_type}: cannot be written as GGUF: llama.cpp does not know {what} for it; it knows "
            f"{', '.join(scalings)}"
        )
    turned = int(head_size * rope.get("partial_rotary_factor", 1.0))
    return {
        "rope.dimension_count": turned,
        "rope.freq_base": float(rope["rope_theta"]),
        **(_scaling(config, rope) if kind not in ("default", "llama3") else {}),
    }


def rope_tensors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Factors, one per frequency, by the name of their tensor in the file."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        frequencies, _ = _initial(config, "llama3")
        pairs = len(frequencies)
        plain = rope["rope_theta"] ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        return {LLAMA3: (plain / frequencies.double()).float().numpy()}
    if rope["rope_type"] == "longrope":
        return {
            name: np.asarray(rope[key], np.float32) for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))
        }
    return {}


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary positions of the blocks that see every token."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _scaling(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    found: dict[str, Any] = {"rope.scaling.type": kind}
    if kind != "longrope":  # whose factors are tensors; llama.cpp would divide by this one as well
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "linear":
        return found
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    found["rope.scaling.original_context_length"] = int(original)
    _, times = _initial(config, kind)
    if kind == "yarn":  # llama.cpp multiplies by this much of itself
        times /= 0.1 * math.log(rope["factor"]) + 1.0
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = float(rope[name])
    if kind == "longrope" or abs(times - 1) > _TOLERANCE:
        found["rope.scaling.attn_factor"] = times
    return found


def _initial(config: Any, kind: str) -> tuple[torch.Tensor, float]:
    """Frequencies, and what cosines and sines are multiplied by, as transformers works them out."""
    frequencies, times = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(times)
