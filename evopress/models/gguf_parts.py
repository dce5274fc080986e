"""A GGUF file that was split into parts (`model-00001-of-00003.gguf`), joined again."""

import re
from pathlib import Path
from typing import Any

import gguf

from evopress.models.gguf_header import (
    SPLIT_COUNT,
    SPLIT_TENSORS,
    GgufHeader,
    GgufTensor,
    check_blocks,
    read_gguf_header,
)
from evopress.util.errors import ModelError

_SPLIT_NUMBER = "split.no"
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 10_000


def parts_of(path: Path) -> list[Path]:
    """The files that make up a model, in order; ``path`` alone where it is not split.

    Raises:
        ModelError: a file is damaged, ``path`` is not the first part, or a part is missing.
    """
    metadata = read_gguf_header(path).metadata
    count = metadata.get(SPLIT_COUNT, 0)
    if not isinstance(count, int) or not 0 <= count < _MOST_PARTS:
        raise ModelError(f"{path}: gives {SPLIT_COUNT} as {count!r}; fetch it again")
    if count <= 1:
        return [path]
    name = _NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{path}: is one of {count} parts ({SPLIT_COUNT}); name them as they were published, "
            f"`...-00001-of-{count:05}.gguf` and so on, so that the others can be found"
        )
    parts = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if path != parts[0]:
        raise ModelError(f"{path}: is part {name['number']} of {count}; give the first part, {parts[0].name}")
    for number, part in enumerate(parts):
        if not part.is_file():
            raise ModelError(f"{part}: missing; {path.name} is one of {count} parts, which lie in one folder")
        if (found := read_gguf_header(part).metadata.get(_SPLIT_NUMBER)) != number:
            raise ModelError(f"{part}: gives {_SPLIT_NUMBER} as {found!r}, not {number}; fetch it again")
    return parts


def whole_header(path: Path) -> GgufHeader:
    """The header of a model's first file, with the tensors of all its parts.

    Raises:
        ModelError: as ``parts_of``; or a tensor lies in two parts, or there are fewer than the header says.
    """
    parts = parts_of(path)
    first = read_gguf_header(path)
    if len(parts) == 1:
        return first
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        held = read_gguf_header(part).tensors
        if twice := sorted(set(held) & set(tensors)):
            raise ModelError(f"{path}: {twice[0]} lies in two of the parts; they do not belong together")
        tensors.update(held)
    promised = first.metadata.get(SPLIT_TENSORS, len(tensors))
    if promised != len(tensors):
        raise ModelError(
            f"{path}: promises {promised} tensors ({SPLIT_TENSORS}), and its parts hold {len(tensors)}; fetch them "
            "again"
        )
    try:
        check_blocks(first.metadata, len(tensors))
    except ValueError as error:
        raise ModelError(f"{path}: no usable GGUF file: it {error}; fetch it again") from error
    return GgufHeader(first.metadata, tensors)


def join(parts: list[Path], target: Path) -> Path:
    """Write one GGUF file with the header of the first part, without its `split.*`, and the tensors of all."""
    readers = [gguf.GGUFReader(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    writer = gguf.GGUFWriter(target, read_gguf_header(parts[0]).architecture)
    for field in readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name != gguf.Keys.General.ARCHITECTURE:
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


def _copy(field: Any, writer: gguf.GGUFWriter) -> None:
    kind = field.types[0]
    items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=items)
