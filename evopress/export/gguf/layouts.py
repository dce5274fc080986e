"""What the header of a GGUF file says of a model, by architecture: the reverse of `evopress/models/gguf_config.py`.

llama.cpp has code for each architecture, and that code knows less than a config of transformers can say. What it does
not know is refused by name here, or, where a shorter context makes it true, said in the log.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from evopress.models.gguf_rope import LLAMA3, LONG, SHORT
from evopress.models.modules import ATTENTION, MLP
from evopress.util.errors import UnsupportedArchitectureError
from evopress.util.progress import log

# Rotary positions as a GGUF file describes them: keys of the header, and factors that divide each frequency's angle.

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


Absent = Collection[tuple[int, str]]
"""Modules that a model lacks, as (block, kind)."""

DECI = "deci"
"""Architecture of llama.cpp for Llamas whose blocks lack modules."""
STAND_IN = 32
"""Size of the feed-forward of zeros in a block that has only attention: llama.cpp drops the attention's output in a
block of `deci` without any. A multiple of the rows of every type that such a matrix may take."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Blocks by which llama.cpp recognizes the Gemma of 27B parameters, whose attention is scaled otherwise."""


@dataclass(frozen=True)
class Layout:
    """How llama.cpp stores models of one `model_type` of transformers."""

    architecture: str
    """What llama.cpp calls it."""
    keys: Callable[[Any], dict[str, Any]]
    """What its header says beside what all say, from the config; without the architecture's name."""
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rotary scaling that its code knows."""
    activation: str = "silu"
    interleaved: bool = False
    """Whether the two halves of each attention head lie row by row beside each other in queries and keys."""
    norms_plus_one: bool = False
    """Whether norms are stored as what they multiply by, which is one more than transformers stores."""
    windows: bool = False
    """Whether its code has sliding windows."""
    biases: tuple[str, ...] = ()
    """Layers, as GGUF names them, whose biases its code adds."""


def layout_of(config: Any) -> Layout:
    """Layout of the model of a transformers config.

    Raises:
        UnsupportedArchitectureError: llama.cpp's code for it is not known here, or does not compute what it does.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        known = ", ".join(sorted(LAYOUTS))
        raise UnsupportedArchitectureError(
            f"{config.model_type}: this architecture cannot be written as GGUF; those that can are {known}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != layout.activation:
        raise _refusal(config, f"its activation is {activation}, and llama.cpp computes {layout.activation}")
    return layout


def header_keys(config: Any, layout: Layout, rows: int, absent: Absent = ()) -> dict[str, Any]:
    """Keys of the header that describe the model, in full.

    Args:
        config: of transformers.
        layout: of the model.
        rows: tokens that the model has an embedding for.
        absent: modules that are left out; they make a Llama a `deci`.

    Raises:
        UnsupportedArchitectureError: llama.cpp cannot compute the model; what is in the way is named.
    """
    size = head_size(config)
    found = {
        "vocab_size": rows,
        "context_length": _context(config, layout),
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **rope_keys(config, layout.scalings, size),
        **layout.keys(config),
    }
    if absent:
        found |= _per_block(config, layout, absent)
    architecture = architecture_of(layout, absent)
    return {f"{architecture}.{key}": value for key, value in found.items()}


def architecture_of(layout: Layout, absent: Absent = ()) -> str:
    """What llama.cpp calls the architecture of a model that lacks the modules ``absent``."""
    return DECI if absent else layout.architecture


def head_size(config: Any) -> int:
    """Numbers per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _per_block(config: Any, layout: Layout, absent: Absent) -> dict[str, list[int]]:
    if layout.architecture != "llama":
        raise _refusal(config, "llama.cpp knows blocks without attention or MLP in Llamas only; drop whole blocks")
    blocks = range(config.num_hidden_layers)
    attends = [(block, ATTENTION) not in absent for block in blocks]
    feeds = [(block, MLP) not in absent for block in blocks]
    if lost := [block for block in blocks if not attends[block] and not feeds[block]]:
        raise ValueError(f"block {lost[0]} has lost both modules; leave it out of the model")
    return {
        "attention.head_count": [config.num_attention_heads if here else 0 for here in attends],
        "attention.head_count_kv": [config.num_key_value_heads if here else 0 for here in attends],
        "feed_forward_length": [config.intermediate_size if here else STAND_IN for here in feeds],
    }


def _context(config: Any, layout: Layout) -> int:
    """Positions over which llama.cpp computes what the model does: no more than a window that its code lacks."""
    positions, window = config.max_position_embeddings, _window(config)
    if layout.windows or window is None or window >= positions:
        return int(positions)
    log.warning(
        "%s: llama.cpp computes it without its sliding window, so the GGUF file gives a context of %d tokens, not %d",
        config.model_type,
        window,
        positions,
    )
    return window


def _window(config: Any) -> int | None:
    """The sliding window of a model some of whose blocks have one."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def _plain(_: Any) -> dict[str, Any]:
    return {}


def _phi3(config: Any) -> dict[str, Any]:
    return {"attention.sliding_window": config.sliding_window or 0}


def _gemma2(config: Any) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping}
    caps["final_logit_softcapping"] = config.final_logit_softcapping
    if not all(caps.values()):
        raise _refusal(config, "llama.cpp caps the logits of every Gemma 2, and this one has no such cap")
    return {**_gemma(config, period=2), **caps}


def _gemma3(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise _refusal(config, "llama.cpp caps no logits of Gemma 3")
    local = config.rope_parameters["sliding_attention"]
    if local["rope_type"] != "default":
        raise _refusal(config, f"its blocks with windows scale positions ({local['rope_type']})")
    return {**_gemma(config, period=6), "rope.freq_base_swa": float(local["rope_theta"])}


def _gemma(config: Any, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; ``period`` is that of their windows where the file does not say."""
    if config.use_bidirectional_attention:
        raise _refusal(config, "in llama.cpp every token of Gemma sees those before it only")
    largest = config.num_hidden_layers == _LARGEST[_gguf_name(config)]
    scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise _refusal(
            config, f"its attention is scaled by {config.query_pre_attn_scalar}, and llama.cpp takes {scale} for it"
        )
    found = _window_period(config)
    pattern = {} if found == period else {"attention.sliding_window_pattern": found}
    return {"attention.sliding_window": config.sliding_window or 0, **pattern}


def _gguf_name(config: Any) -> str:
    return config.model_type.removesuffix("_text")


def _window_period(config: Any) -> int:
    """The n of which every n-th block has no window, as llama.cpp counts them."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    for period in range(1, len(slides) + 2):
        if slides == [bool((block + 1) % period) for block in range(len(slides))]:
            return period
    raise _refusal(
        config, "llama.cpp gives every n-th block a view without window, and in this model they follow no such rule"
    )


def _refusal(config: Any, reason: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"{config.model_type}: cannot be written as GGUF: {reason}")


_QKV = ("attn_q", "attn_k", "attn_v")
_LLAMA = Layout(
    "llama",
    _plain,
    ("default", "linear", "yarn", "llama3", "longrope"),
    interleaved=True,
    biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
)
_GELU = "gelu_pytorch_tanh"
LAYOUTS: Mapping[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": Layout("phi3", _phi3, ("default", "longrope")),
    "qwen2": Layout("qwen2", _plain, biases=_QKV),
    "qwen3": Layout("qwen3", _plain),
    "gemma2": Layout("gemma2", _gemma2, ("default", "linear"), _GELU, norms_plus_one=True, windows=True),
    "gemma3_text": Layout("gemma3", _gemma3, ("default", "linear"), _GELU, norms_plus_one=True, windows=True),
}
"""By `model_type`."""
