"""A GGUF file turned into an ordinary Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from evopress.models.buildable import built_on_meta
from evopress.models.gguf_header import read_gguf_header
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief

_SHARD = "5GB"


def dequantize(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in ``dtype``, config, tokenizer with chat template, and generation config to ``folder``.

    Takes memory for the weights in float32.

    Raises:
        ModelError: the file is damaged, or lacks what a tokenizer needs.
        UnsupportedArchitectureError: transformers cannot read this architecture from GGUF.
    """
    disable_progress_bar()  # of transformers, whose bars would fill the log
    header = read_gguf_header(gguf)
    name = str(header.metadata.get("general.architecture", "unknown architecture"))
    built_on_meta(read_config(gguf), header.elements)
    model = _load(gguf, name)
    clean = _without_quantization(model, dtype)
    clean.save_pretrained(folder, max_shard_size=_SHARD)
    model.generation_config.save_pretrained(folder)
    try:
        _save_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), folder)
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{gguf}: its tokenizer cannot be read ({error})") from error


def read_config(gguf: Path) -> Any:
    """The transformers config that a GGUF file stands for.

    Raises:
        ModelError: the file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    name = read_gguf_header(gguf).metadata.get("general.architecture", "unknown architecture")
    try:
        return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # foreign parsers meet foreign data
        reason = brief(error)
        if "not supported" in reason:
            raise UnsupportedArchitectureError(f"{name}: transformers cannot read it from GGUF: {reason}") from error
        raise ModelError(f"{gguf}: its config cannot be read ({reason}); fetch it again") from error


def _load(gguf: Path, name: str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ValueError as error:
        if "not supported" in str(error):
            raise UnsupportedArchitectureError(f"{name}: transformers cannot read it from GGUF: {error}") from error
        raise ModelError(f"{gguf}: damaged or cut short ({error}); fetch it again") from error
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{gguf}: damaged or cut short ({error}); fetch it again") from error


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer without what transformers adds past the file's own tokens, such as an `<|endoftext|>`.

    The model has no embedding for such a token.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    own = max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False).values())
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] <= own]
    if len(kept) < len(content["added_tokens"]):
        text = json.dumps({**content, "added_tokens": kept}, ensure_ascii=False, indent=2)
        path.write_text(text, encoding="utf-8")


def _without_quantization(model: Any, dtype: torch.dtype) -> Any:
    """The same model without the marks of its origin, which keep transformers from saving it."""
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = type(model.config).from_dict(values)
    with init_empty_weights(include_buffers=False):
        clean = type(model)._from_config(config, dtype=dtype)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    clean.load_state_dict(state, assign=True)
    clean.tie_weights()
    return clean
