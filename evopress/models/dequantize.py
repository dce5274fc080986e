"""A GGUF file turned into an ordinary Hugging Face folder."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.utils.logging import disable_progress_bar

from evopress.models.buildable import built_on_meta
from evopress.models.gguf_config import read_config
from evopress.models.gguf_header import GgufHeader, read_gguf_header
from evopress.models.gguf_parts import join, parts_of
from evopress.models.gguf_rope import FACTORS
from evopress.models.gguf_tokenizer import save_tokenizer
from evopress.util.errors import ModelError, UnsupportedArchitectureError, brief

_SHARD = "5GB"


def dequantize(gguf: Path, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Write weights in ``dtype``, config, tokenizer with chat template, and generation config to ``folder``.

    Takes memory for the weights in float32, and disk space for a copy of a file that is split into parts.

    Returns:
        The files that were read: ``gguf``, which is the first part where there are several.

    Raises:
        ModelError: a file is damaged or missing, lacks a weight, or what a tokenizer needs.
        UnsupportedArchitectureError: the architecture cannot be read from GGUF, or holds what its model has no place
            for; the tensor or the key of the header is named.
    """
    parts = parts_of(gguf)
    if len(parts) == 1:
        _dequantize(gguf, folder, dtype)
        return parts
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".joined.") as scratch:
        joined = join(parts, Path(scratch, gguf.name))
        try:
            _dequantize(joined, folder, dtype)
        except ModelError as error:
            raise type(error)(str(error).replace(str(joined), str(gguf))) from error
    return parts


def _dequantize(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    disable_progress_bar()  # of transformers, whose bars would fill the log
    header = read_gguf_header(gguf)
    config = read_config(gguf)
    skeleton = built_on_meta(config, header.elements)
    if not is_gguf_arch_supported(header.architecture):
        _check_all_used(header, _known_names(skeleton, header.architecture), gguf)
    model = _load(gguf, header, config)
    clean = _without_quantization(model, dtype)
    clean.save_pretrained(folder, max_shard_size=_SHARD)
    model.generation_config.eos_token_id = _ends(header) or model.generation_config.eos_token_id
    model.generation_config.save_pretrained(folder)
    save_tokenizer(gguf, folder, config.get_text_config().vocab_size)


def _known_names(skeleton: Any, architecture: str) -> set[str]:
    """Names of the tensors that transformers puts into the model; it drops all others without a word."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    return set(get_gguf_hf_weights_map(skeleton, processor))


def _check_all_used(header: GgufHeader, known: Iterable[str], gguf: Path) -> None:
    if unused := sorted(set(header.shapes) - set(known) - set(FACTORS)):
        raise UnsupportedArchitectureError(
            f"{gguf}: holds {unused[0]}{_and_more(unused)}, for which {header.architecture} has no place in "
            "transformers; give the model's safetensors"
        )


def _load(gguf: Path, header: GgufHeader, config: Any) -> Any:
    """The model in float32, with every tensor of the file, and nothing that is not in it."""
    # Where the package `kernels` is installed, weights of some architectures would stay packed unless this is said.
    unpacked = GgufConfig(dequantize=True)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            config=config,
            dtype=torch.float32,
            quantization_config=unpacked,
            output_loading_info=True,
        )
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{gguf}: damaged or cut short ({brief(error)}); fetch it again") from error
    if is_gguf_arch_supported(header.architecture):
        _check_all_used(header, set(header.shapes) - set(info["unexpected_keys"]), gguf)
    _fill_missing(model, info["missing_keys"], gguf)
    return model


def _fill_missing(model: Any, missing: Iterable[str], gguf: Path) -> None:
    """Set biases to zero that no block has in the file; any other parameter must be there."""
    without = set(missing)
    parameters = dict(model.named_parameters())
    for name in sorted(without):
        alike = {other for other in parameters if _in_any_block(other) == _in_any_block(name)}
        if not name.endswith(".bias") or not alike <= without:
            raise ModelError(
                f"{gguf}: lacks the weight of {name}{_and_more(without)}; the file is incomplete, fetch it again"
            )
        torch.nn.init.zeros_(parameters[name])


def _in_any_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _and_more(names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f" and {others} more" if others > 0 else ""


def _ends(header: GgufHeader) -> int | list[int] | None:
    """Tokens at which generation stops: of the end of a text, a turn, a message."""
    found = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(id for id in found if isinstance(id, int)))
    return ids[0] if len(ids) == 1 else ids or None


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
