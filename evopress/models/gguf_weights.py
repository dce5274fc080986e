"""Weights of a GGUF file under the names, and in the layout, that transformers has for them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from evopress.models.gguf_header import GgufHeader, GgufTensor
from evopress.models.gguf_rope import FACTORS
from evopress.models.skeleton import load_config
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief

_PLAIN = {"F32": np.float32, "F16": np.float16}
_NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
"""Architectures whose norms multiply by one more than transformers stores, and by what GGUF stores."""
_SHARED = {"mistral": "llama"}
"""Architecture of the models of a `model_type` that is called otherwise."""


def read_weights(path: Path, header: GgufHeader, model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight of ``model`` in ``dtype``, by its name there; those that are tied to another are left out.

    Args:
        path: the file, for messages.
        header: its header, with the tensors of all parts.
        model: of transformers, whose weights may be on the meta device.
        dtype: of the result.

    Raises:
        UnsupportedArchitectureError: the file has a tensor that the model has no place for; it is named.
        ModelError: a weight is missing, of another shape, or of a type that cannot be read; it is named.
    """
    expected = model.state_dict()
    stored = stored_names(expected, header.architecture, model.config.num_hidden_layers)
    refuse_left_over(path, header.architecture, set(header.tensors) - {*stored.values(), *FACTORS})
    weights = {}
    for name, parameter in expected.items():
        key = stored.get(name, name)
        if key in header.tensors:
            tensor = _read_named(path, header, key)
            tensor = _in_layout_of_transformers(tensor, key, header.architecture, model.config)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{path}: {key} is {list(tensor.shape)}, and its header asks for {list(parameter.shape)}; they do "
                    "not belong together"
                )
            weights[name] = tensor.to(dtype)
        elif _is_zero(name, expected, stored, header):
            weights[name] = torch.zeros(parameter.shape, dtype=dtype)
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            raise ModelError(f"{path}: lacks {key}; the file is incomplete, fetch it again")
    return weights


def stored_names(names: Iterable[str], architecture: str, blocks: int) -> dict[str, str]:
    """Name in a GGUF file of each parameter of transformers that has one."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    mapping = gguf.get_tensor_name_map(kinds[architecture], blocks)
    found = {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if (
        "lm_head.weight" in found
    ):  # also where the architecture ties it to the embedding, and a file holds it all the same
        found["lm_head.weight"] = "output.weight"
    return {name: key for name, key in found.items() if key is not None}


def names_in_gguf(model: Path, names: Sequence[str]) -> dict[str, str]:
    """Name in a GGUF file of each of some parameters of a model folder.

    Raises:
        UnsupportedArchitectureError: llama.cpp has no such model, or no place for one of them.
    """
    config = load_config(model).get_text_config()
    architecture = _SHARED.get(config.model_type, config.model_type.removesuffix("_text"))
    if architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise UnsupportedArchitectureError(f"{config.model_type}: llama.cpp has no such models")
    found = stored_names(names, architecture, config.num_hidden_layers)
    if lost := sorted(set(names) - set(found)):
        raise UnsupportedArchitectureError(f"{config.model_type}: llama.cpp has no place for {lost[0]}")
    return found


def refuse_left_over(path: Path, architecture: str, names: Iterable[str]) -> None:
    """Refuse tensors that have no place in the model.

    Raises:
        UnsupportedArchitectureError: there are some; the first is named.
    """
    if unused := sorted(names):
        more = f" and {len(unused) - 1} more tensors" if len(unused) > 1 else ""
        raise UnsupportedArchitectureError(
            f"{path}: holds {unused[0]}{more}, for which {architecture} has no place in transformers; give the model's "
            "safetensors"
        )


def read_tensor(tensor: GgufTensor) -> torch.Tensor:
    """A tensor in float32.

    Raises:
        NotImplementedError: its type cannot be unpacked.
    """
    raw: Any = np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.size,))
    kind = gguf.GGMLQuantizationType(tensor.kind)
    if kind.name in _PLAIN:
        values = raw.view(_PLAIN[kind.name]).astype(np.float32)
    else:
        rows = raw.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
        values = gguf.dequantize(rows, kind)
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(tensor.shape)


def _read_named(path: Path, header: GgufHeader, key: str) -> torch.Tensor:
    try:
        return read_tensor(header.tensors[key])
    except (NotImplementedError, KeyError, ValueError) as error:
        kind = gguf.GGMLQuantizationType(header.tensors[key].kind).name
        raise ModelError(
            f"{path}: {key} is stored as {kind}, which cannot be unpacked ({brief(error)}); give another file"
        ) from error


def _in_layout_of_transformers(tensor: torch.Tensor, key: str, architecture: str, config: Any) -> torch.Tensor:
    """Undo what converters do to the values of an architecture."""
    if architecture in _NORMS_PLUS_ONE and key.endswith("norm.weight"):
        return tensor - 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(key.split(".")[-2])
    if architecture == "llama" and heads is not None:
        # GGUF has the two halves of each head interleaved: rows that turn together lie next to each other.
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _is_zero(name: str, expected: Iterable[str], stored: Mapping[str, str], header: GgufHeader) -> bool:
    """Whether ``name`` is a bias that no block has in the file, where the model has some other bias only."""
    alike = [other for other in expected if _in_any_block(other) == _in_any_block(name)]
    return name.endswith(".bias") and not any(stored.get(other) in header.tensors for other in alike)


def _in_any_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
