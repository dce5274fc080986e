"""A GGUF file turned into an ordinary Hugging Face folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.utils.logging import disable_progress_bar

from evopress.models.gguf_config import read_config
from evopress.models.gguf_header import GgufHeader, parts_of, read_gguf_header, whole_header
from evopress.models.gguf_tokenizer import save_tokenizer
from evopress.models.gguf_weights import read_weights, refuse_left_over
from evopress.models.skeleton import built_on_meta, skeleton_of
from evopress.util.errors import ModelError, brief

_SHARD = "5GB"


def dequantize(gguf: Path, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Write weights in ``dtype``, config, tokenizer with chat template, and generation config to ``folder``.

    Takes memory for the weights.

    Returns:
        The files that were read: ``gguf``, which is the first part where there are several.

    Raises:
        ModelError: a file is damaged or missing, lacks a weight, or what a tokenizer needs.
        UnsupportedArchitectureError: the architecture cannot be read from GGUF, or holds what its model has no place
            for; the tensor or the key of the header is named.
    """
    disable_progress_bar()  # of transformers, whose bars would fill the log
    header, config = whole_header(gguf), read_config(gguf)
    built_on_meta(config, header.elements)
    parts = parts_of(gguf)
    if is_gguf_arch_supported(header.architecture):
        with _one_file(parts, folder) as whole:
            model = _by_transformers(gguf, whole, header, dtype)
    else:
        model = skeleton_of(config, dtype)
        model.load_state_dict(read_weights(gguf, header, model, dtype), strict=False, assign=True)
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size=_SHARD)
    model.generation_config.eos_token_id = _ends(header) or model.generation_config.eos_token_id
    model.generation_config.save_pretrained(folder)
    save_tokenizer(gguf, folder, config.get_text_config().vocab_size)
    return parts


@contextmanager
def _one_file(parts: list[Path], folder: Path) -> Iterator[Path]:
    """What transformers can read: the parts joined, for as long as it takes."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".joined.") as scratch:
        yield _join(parts, Path(scratch, parts[0].name))


def _by_transformers(gguf: Path, whole: Path, header: GgufHeader, dtype: torch.dtype) -> Any:
    """The model as transformers reads it from ``whole``, with every tensor and nothing that is not in the file."""
    # Where the package `kernels` is installed, weights would stay packed unless this is said.
    options: Any = {"quantization_config": GgufConfig(dequantize=True), "output_loading_info": True}
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            whole.parent, gguf_file=whole.name, dtype=torch.float32, **options
        )
    except Exception as error:  # foreign parsers meet foreign data
        raise ModelError(f"{gguf}: damaged or cut short ({brief(error)}); fetch it again") from error
    model, info = loaded
    refuse_left_over(gguf, header.architecture, info["unexpected_keys"])
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{gguf}: lacks {missing[0]}; the file is incomplete, fetch it again")
    return _without_quantization(model, dtype)


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


def _join(parts: list[Path], target: Path) -> Path:
    """Write one GGUF file with the header of the first part, without its `split.*`, and the tensors of all."""
    readers = [GGUFReader(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    writer = GGUFWriter(target, read_gguf_header(parts[0]).architecture)
    for field in readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name != Keys.General.ARCHITECTURE:
            _copy(field, writer)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return target


def _copy(field: Any, writer: GGUFWriter) -> None:
    kind = field.types[0]
    items = field.types[-1] if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=items)
