"""The transformers config that a GGUF file stands for.

transformers' own reading leaves out what it has no name for, and takes the defaults of some checkpoint instead. Here
every key of the architecture is honoured, or known to change nothing at the value that it has, or refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from evopress.models import gguf_rope
from evopress.models.gguf_header import GgufHeader, whole_header
from evopress.models.gguf_weights import read_tensor
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief

_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "leading_dense_block_count"), (0,)),
    **dict.fromkeys(("nextn_predict_layers", "pooling_type", "attention.sliding_window"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (0,)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Values at which a key changes nothing."""
_IGNORED = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length", "use_parallel_residual"}
"""Told by tensors, or notes on how the model was made; the original length counts only where a scaling takes it out."""

_PER_BLOCK = {"attention.sliding_window_pattern"}


@dataclass
class _Source:
    """What is known of a file while its config is made."""

    header: GgufHeader
    keys: dict[str, Any]
    """Those of the architecture, without its name before them; who honours one takes it out."""
    factors: Mapping[str, list[float]]
    """Of rotary positions, by the name of their tensor."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of the config."""

    def has(self, *parts: str) -> bool:
        """Whether a tensor of some block is called so."""
        return any(name.endswith(parts) for name in self.header.tensors if name.startswith("blk."))

    @property
    def head_size(self) -> int:
        """Numbers per attention head."""
        return int(self.values["head_dim"])


@dataclass(frozen=True)
class _Family:
    """How an architecture's keys become a config of transformers."""

    model_type: str
    norm: tuple[str, str]
    """Key of the epsilon, and its name in the config."""
    finish: Callable[[_Source], None]
    """Add what only this architecture has."""
    partial: bool = False
    """Whether it can turn only the first numbers of each head."""
    head_dim: bool = True
    """Whether the config can give heads another size than their share of the hidden size."""


def read_config(path: Path) -> Any:
    """The transformers config that a GGUF file stands for.

    Raises:
        ModelError: the file is damaged, or lacks a key.
        UnsupportedArchitectureError: it cannot be read from GGUF, or a key asks for what it cannot do; it is named.
    """
    header = whole_header(path)
    _check_kind(header, path)
    name = header.architecture
    if name in _BY_TRANSFORMERS:
        return _of_transformers(path, header, _BY_TRANSFORMERS[name])
    if name not in _FAMILIES:
        known = ", ".join(sorted([*_FAMILIES, *_BY_TRANSFORMERS]))
        raise UnsupportedArchitectureError(
            f"{name}: this architecture is not supported from GGUF ({known} are); give the model's safetensors"
        )
    try:
        held = [name for name in gguf_rope.FACTORS if name in header.tensors]
        factors = {name: read_tensor(header.tensors[name]).reshape(-1).tolist() for name in held}
        return _config(_FAMILIES[name], _Source(header, _keys(header), factors))
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"{path}: {name}.{error}; give the model's safetensors") from error
    except KeyError as error:
        raise ModelError(f"{path}: its header lacks {name}.{error.args[0]}; convert the model again") from error
    except Exception as error:  # foreign code meets foreign data
        raise ModelError(f"{path}: its header gives no usable config ({brief(error)}); fetch it again") from error


def _check_kind(header: GgufHeader, path: Path) -> None:
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path}: holds no whole model (general.type is {kind!r}); give the file of the model itself")
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{path}: has no tensor token_embd.weight; it holds no whole model")


def _keys(header: GgufHeader) -> dict[str, Any]:
    prefix = f"{header.architecture}."
    return {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}


def _config(family: _Family, source: _Source) -> Any:
    keys, values = source.keys, source.values
    if lists := [key for key, value in keys.items() if isinstance(value, list) and key not in _PER_BLOCK]:
        raise UnsupportedArchitectureError(f"{lists[0]}: differs from block to block")
    values.update({name: keys.pop(key) for key, name in _COMMON.items()})
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = keys.pop("attention.head_count_kv", heads)
    values[family.norm[1]] = keys.pop(family.norm[0])
    values["head_dim"] = keys.pop("attention.key_length", values["hidden_size"] // heads)
    _check_heads(family, source)
    values["vocab_size"] = source.header.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in source.header.tensors
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        values[f"{name}_token_id"] = source.header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    _add_rope(family, source)
    family.finish(source)
    _check_rest(source)
    if not family.head_dim:
        del values["head_dim"]
    made = AutoConfig.for_model(family.model_type, **values)
    made.dtype = torch.float32
    return made


def _check_heads(family: _Family, source: _Source) -> None:
    values = source.values
    if source.keys.pop("attention.value_length", source.head_size) != source.head_size:
        raise UnsupportedArchitectureError("attention.value_length: differs from the length of keys")
    if not family.head_dim and source.head_size * values["num_attention_heads"] != values["hidden_size"]:
        raise UnsupportedArchitectureError("attention.key_length: is not the hidden size divided by the heads")


def _add_rope(family: _Family, source: _Source) -> None:
    """Set `rope_parameters`, from header and factors."""
    base, context = source.keys.pop("rope.freq_base", gguf_rope.BASE), source.values["max_position_embeddings"]
    turned = source.keys.pop("rope.dimension_count", source.head_size)
    for name, factors in source.factors.items():
        if 2 * len(factors) != turned:
            raise UnsupportedArchitectureError(f"rope.dimension_count: is {turned}, and {name} has {len(factors)}")
    rope = _with_factors(source, base, context)
    if family.partial:
        rope["partial_rotary_factor"] = turned / source.head_size
    elif turned != source.head_size:
        raise UnsupportedArchitectureError(f"rope.dimension_count: is {turned}, where a head has {source.head_size}")
    source.values["rope_parameters"] = {**rope, "rope_theta": base}


def _with_factors(source: _Source, base: float, context: int) -> dict[str, Any]:
    if long := source.factors.get(gguf_rope.LONG):
        return _longrope(source, long, context)
    rope = gguf_rope.scaling(source.keys, context)
    if freqs := source.factors.get(gguf_rope.LLAMA3):
        more = gguf_rope.from_factors(freqs, base, context)
        if "default" not in (rope["rope_type"], more["rope_type"]):
            raise UnsupportedArchitectureError("rope.scaling: stands beside rope_freqs, and only one can be had")
        return more if rope["rope_type"] == "default" else rope
    return rope


def _longrope(source: _Source, long: list[float], context: int) -> dict[str, Any]:
    """LongRoPE; which of the two lists of factors applies depends on the length of a text."""
    for key in ("rope.scaling.type", "rope.scaling.factor"):
        source.keys.pop(key, None)
    short = source.factors.get(gguf_rope.SHORT)
    original = source.keys.get("rope.scaling.original_context_length")
    if short is None or original is None:
        raise UnsupportedArchitectureError("rope.scaling: has factors for long texts only, or not where they begin")
    rope = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }
    attention = source.keys.pop("rope.scaling.attn_factor", None)
    return rope if attention is None else {**rope, "attention_factor": attention}


def _check_rest(source: _Source) -> None:
    """Refuse the first key that nobody honours, and that changes something."""
    window = source.keys.get("attention.sliding_window", 0)
    if isinstance(window, int) and window >= source.values["max_position_embeddings"]:
        del source.keys["attention.sliding_window"]
    for key, value in sorted(source.keys.items()):
        if key not in _IGNORED and value not in _NEUTRAL.get(key, ()):
            raise UnsupportedArchitectureError(f"{key}: is {value!r}, and what it asks for cannot be had from GGUF")


_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_ATTENTION_BIASES = (*_QKV_BIASES, "attn_output.bias")
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


def _biases(source: _Source) -> None:
    source.values["attention_bias"] = source.has(*_ATTENTION_BIASES)
    source.values["mlp_bias"] = source.has(*_MLP_BIASES)


def _attention_bias(source: _Source) -> None:
    source.values["attention_bias"] = source.has(*_ATTENTION_BIASES)


def _nothing(_: _Source) -> None:
    """All is said."""


def _phi3(source: _Source) -> None:
    original = source.keys.get("rope.scaling.original_context_length", source.values["max_position_embeddings"])
    source.values["original_max_position_embeddings"] = original
    source.values["sliding_window"] = source.keys.pop("attention.sliding_window", 0) or None
    rope = source.values["rope_parameters"]["rope_type"]
    if rope not in ("default", "longrope"):
        raise UnsupportedArchitectureError(f"rope.scaling.type: {rope} is none that this architecture has")


def _starcoder2(source: _Source) -> None:
    source.values["use_bias"] = source.has(*_ATTENTION_BIASES, *_MLP_BIASES)
    source.values["sliding_window"] = source.keys.pop("attention.sliding_window", 0) or None


def _stablelm(source: _Source) -> None:
    source.values["use_qkv_bias"] = source.has(*_QKV_BIASES)
    source.values["use_parallel_residual"] = not source.has("ffn_norm.weight")
    source.values["qk_layernorm"] = source.has("attn_q_norm.weight")


def _gemma(source: _Source, blocks_of_27b: int, period: int, window: int) -> None:
    """What Gemma 2 and 3 share: windows in most blocks, and an attention scale that only the largest has otherwise."""
    values, keys = source.values, source.keys
    largest = values["num_hidden_layers"] == blocks_of_27b
    values["query_pre_attn_scalar"] = (
        values["hidden_size"] // values["num_attention_heads"] if largest else source.head_size
    )
    _attention_bias(source)
    values["sliding_window"] = keys.pop("attention.sliding_window", window)
    pattern = keys.pop("attention.sliding_window_pattern", period)
    if isinstance(pattern, int):
        pattern = [bool((block + 1) % pattern) for block in range(values["num_hidden_layers"])]
    if not values["sliding_window"]:
        pattern, values["sliding_window"] = [False] * values["num_hidden_layers"], None
    values["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _gemma2(source: _Source) -> None:
    _gemma(source, blocks_of_27b=46, period=2, window=4096)
    source.values["attn_logit_softcapping"] = source.keys.pop("attn_logit_softcapping", 50.0) or None
    source.values["final_logit_softcapping"] = source.keys.pop("final_logit_softcapping", 30.0) or None


def _gemma3(source: _Source) -> None:
    _gemma(source, blocks_of_27b=62, period=6, window=0)
    source.values["attn_logit_softcapping"] = source.keys.pop("attn_logit_softcapping", 0.0) or None
    source.values["final_logit_softcapping"] = source.keys.pop("final_logit_softcapping", 0.0) or None
    local = {"rope_type": "default", "rope_theta": source.keys.pop("rope.freq_base_swa", gguf_rope.BASE)}
    full = source.values["rope_parameters"]
    source.values["rope_parameters"] = {"full_attention": full, "sliding_attention": local}


_FAMILIES = {
    "llama": _Family("llama", (_RMS, "rms_norm_eps"), _biases),
    "qwen2": _Family("qwen2", (_RMS, "rms_norm_eps"), _nothing),
    "qwen3": _Family("qwen3", (_RMS, "rms_norm_eps"), _attention_bias),
    "phi3": _Family("phi3", (_RMS, "rms_norm_eps"), _phi3, partial=True, head_dim=False),
    "gemma2": _Family("gemma2", (_RMS, "rms_norm_eps"), _gemma2),
    "gemma3": _Family("gemma3_text", (_RMS, "rms_norm_eps"), _gemma3),
    "starcoder2": _Family("starcoder2", (_LAYER, "norm_epsilon"), _starcoder2, head_dim=False),
    "stablelm": _Family("stablelm", (_LAYER, "layer_norm_eps"), _stablelm, partial=True, head_dim=False),
    "nemotron": _Family("nemotron", (_LAYER, "norm_eps"), _biases, partial=True),
}

_READ = {*_COMMON, "attention.head_count_kv", _RMS, "rope.freq_base", "vocab_size"}
_DELTA = {
    *("attention.key_length", "attention.value_length", "full_attention_interval", "nextn_predict_layers"),
    *("rope.dimension_count", "rope.dimension_sections", "ssm.conv_kernel", "ssm.state_size", "ssm.group_count"),
    *("ssm.time_step_rank", "ssm.inner_size"),
}
_BY_TRANSFORMERS = {"lfm2": {*_READ, "shortconv.l_cache"}, "qwen35": {*_READ, *_DELTA}}
"""Architectures whose config transformers makes in full, with the keys that it honours."""


def _of_transformers(path: Path, header: GgufHeader, honoured: set[str]) -> Any:
    name = header.architecture
    for key, value in sorted(_keys(header).items()):
        if key not in honoured | _IGNORED and value not in _NEUTRAL.get(key, ()):
            raise UnsupportedArchitectureError(
                f"{path}: {name}.{key}: is {value!r}, and what it asks for cannot be had from GGUF; give the model's "
                "safetensors"
            )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except KeyError as error:
        raise ModelError(f"{path}: its header lacks {error.args[0]}; convert the model again") from error
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{path}: its config cannot be read ({brief(error)}); fetch it again") from error
    config.tie_word_embeddings = "output.weight" not in header.tensors  # which may lie in another part
    return config
