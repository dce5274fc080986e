"""GGUF files as converters write them, of tiny models of transformers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

WORDS = ["<pad>", "<s>", "</s>", *map(chr, range(33, 125)), "ab"]
TOKENIZER: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": WORDS,
    "token_type": [3, 3, 3, *[1] * 93],
    "merges": ["a b"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "padding_token_id": 0,
}
"""Keys under `tokenizer.ggml.`: a token for each printable character of ASCII."""
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    architecture: str,
    keys: Mapping[str, Any],
    *,
    without: Iterable[str] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` with what every converter writes, and more.

    Args:
        path: the file.
        model: in float32.
        architecture: what llama.cpp calls it.
        keys: of the architecture, without its name before them.
        without: names of tensors to leave out.
        tensors: further ones.
        tokenizer: keys under `tokenizer.ggml.`; None for ``TOKENIZER``.
        metadata: further keys, in full.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    common = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    add(writer, {f"{architecture}.{key}": value for key, value in {**common, **keys}.items()})
    add(writer, {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or TOKENIZER).items()})
    add(writer, metadata or {})
    for name, tensor in {**stored(model, architecture), **(tensors or {})}.items():
        if name not in without:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    """Add keys with the type that converters give such a value; None leaves one out."""
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)


def stored(model: transformers.PreTrainedModel, architecture: str) -> dict[str, torch.Tensor]:
    """The weights of ``model`` by their names in GGUF, and in its layout."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            found[key] = _laid_out(tensor, key, architecture, model.config)
    return found


def _laid_out(tensor: torch.Tensor, key: str, architecture: str, config: Any) -> torch.Tensor:
    if architecture in ("gemma2", "gemma3", "nemotron") and key.endswith("norm.weight"):
        return tensor + 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(key.split(".")[-2])
    if architecture == "llama" and heads:
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor.squeeze(1) if "shortconv.conv" in key else tensor
