"""Header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), read with every number checked against the file.

The gguf library trusts what a file claims; this check comes before it, so a damaged or hostile header ends in an error
and not in an endless loop or a huge allocation. It imports nothing heavy.

A model that was split into files (`model-00001-of-00003.gguf`) has the header of the first, with the tensors of all.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from evopress.util.errors import ModelError

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_LONGEST_NAME = (1 << 16) - 1
_LONGEST_TEXT = 1 << 16
"""Longer texts (a whole tokenizer, say) are passed over unless asked for."""
_LONGEST_ARRAY = 1 << 14
"""The same for arrays of numbers: those that hold a value per block are shorter, those per token longer."""
_SPLIT_COUNT, _SPLIT_NUMBER, _SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 10_000
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
# Numbers in a block of each tensor type, and its bytes.
_TYPES = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82)},
    **{23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2)},
    **{34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18)},
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, and where it lies."""

    path: Path
    """The file."""
    kind: int
    """Number of its type, in the gguf library's `GGMLQuantizationType`."""
    shape: tuple[int, ...]
    """In the order of torch: the last dimension lies together."""
    start: int
    """First byte in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself, and holds."""

    metadata: Mapping[str, Any]
    """By key; arrays of texts or of more than 16,384 numbers, and texts of more than 64 KB, are given by their number
    of elements or bytes, unless they were asked for."""
    tensors: Mapping[str, GgufTensor]
    """By name."""

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        """What the file calls its architecture."""
        return str(self.metadata.get("general.architecture", "unknown architecture"))


@dataclass
class _Reader:
    """Little-endian values from a stream, never more than the file holds."""

    path: Path
    stream: BinaryIO
    size: int
    whole: str | None = None
    """Keys that begin so are read in full."""

    def require(self, count: int) -> None:
        """Refuse to go on with ``count`` bytes that the file does not have."""
        left = self.size - self.stream.tell()
        if count > left:
            raise ValueError(f"claims {count} bytes where {left} are left")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.require(count)
        return self.stream.read(count)

    def skip(self, count: int) -> int:
        """Pass over bytes; returns how many."""
        self.require(count)
        self.stream.seek(count, 1)
        return count

    def scalar(self, kind: str) -> Any:
        """The next number, of a kind that `struct` names."""
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def name(self) -> str:
        """The next short text: a key, or the name of a tensor."""
        length = self.scalar("Q")
        if length > _LONGEST_NAME:
            raise ValueError(f"has a name of {length} bytes")
        return self.take(length).decode("utf-8")

    def value(self, key: str) -> Any:
        """The value of ``key``, or the number of its elements or bytes where it is long."""
        kind = self.scalar("I")
        whole = self.whole is not None and key.startswith(self.whole)
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            return _shortest(value) if _SCALARS[kind] == "f" else value
        if kind == _STRING:
            length = self.scalar("Q")
            return self.take(length).decode("utf-8") if whole or length <= _LONGEST_TEXT else self.skip(length)
        if kind == _ARRAY:
            return self._array(whole)
        raise ValueError(f"has a value of unknown type {kind}")

    def _array(self, whole: bool) -> list[Any] | int:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            size = count * struct.calcsize("<" + _SCALARS[kind])
            if whole or count <= _LONGEST_ARRAY:
                return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(size)))
            self.skip(size)
        elif kind == _STRING:
            self.require(8 * count)
            if whole:
                return [self.take(self.scalar("Q")).decode("utf-8") for _ in range(count)]
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            raise ValueError(f"has an array of type {kind}")
        return count


def _shortest(value: float) -> float:
    """The number of fewest digits that is ``value`` in 32 bits: 1e-05 was meant where 9.999999747378752e-06 is held."""
    for digits in range(6, 9):
        shorter = float(f"{value:.{digits}g}")
        if _in_32_bits(shorter) == value:
            return shorter
    return value


def _in_32_bits(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf


def read_gguf_header(path: Path, *, whole: str | None = None) -> GgufHeader:
    """Read and check the header; values of keys that begin with ``whole`` are read in full.

    Raises:
        ModelError: missing, no GGUF, cut short or with a header that does not fit the file.
    """
    if path.is_dir():
        raise ModelError(f"{path}: is a folder, not a GGUF file; write `source: folder`, or name the file in it")
    try:
        with path.open("rb") as stream:
            return _read(_Reader(path, stream, path.stat().st_size, whole))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; check the path of the GGUF file") from None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: no usable GGUF file: it {error}; fetch it again") from error


def _read(reader: _Reader) -> GgufHeader:
    magic = reader.take(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"starts with {magic!r}, not {_MAGIC!r}")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"is of version {version}, and versions 2 and 3 can be read")
    tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(pairs):
        key = reader.name()
        if key in metadata:
            raise ValueError(f"has {key!r} twice")
        metadata[key] = reader.value(key)
    if not isinstance(metadata.get(_SPLIT_COUNT), int) or metadata[_SPLIT_COUNT] <= 1:  # else others hold most tensors
        check_blocks(metadata, tensors)
    found: dict[str, GgufTensor] = {}
    for _ in range(tensors):
        name = reader.name()
        if name in found:
            raise ValueError(f"has tensor {name!r} twice")
        found[name] = _tensor(reader, name)
    return GgufHeader(metadata, _placed(found, reader, metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)))


def check_blocks(metadata: Mapping[str, Any], tensors: int) -> None:
    """Refuse more blocks than tensors: such a model would be built at length, and in vain.

    Raises:
        ValueError: there are more.
    """
    for key, value in metadata.items():
        if key.endswith(".block_count") and not (isinstance(value, int) and 0 <= value <= tensors):
            raise ValueError(f"gives {key} as {value!r}, with {tensors} tensors")


def _tensor(reader: _Reader, name: str) -> GgufTensor:
    """A tensor, with its first byte counted from where all tensors begin."""
    count = reader.scalar("I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"gives tensor {name!r} {count} dimensions")
    dimensions = [reader.scalar("Q") for _ in range(count)]
    kind, offset = reader.scalar("I"), reader.scalar("Q")
    if kind not in _TYPES:
        raise ValueError(f"has tensor {name!r} of unknown type {kind}")
    block, size = _TYPES[kind]
    if 0 in dimensions or (dimensions[0] if dimensions else 1) % block:
        raise ValueError(f"gives tensor {name!r} the shape {dimensions}, which its type cannot have")
    return GgufTensor(reader.path, kind, tuple(reversed(dimensions)), offset, math.prod(dimensions) // block * size)


def _placed(tensors: Mapping[str, GgufTensor], reader: _Reader, alignment: Any) -> dict[str, GgufTensor]:
    """Tensors with their first bytes counted from that of the file, in which they lie aligned and apart."""
    if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"asks for an alignment of {alignment!r} bytes")
    start = -(-reader.stream.tell() // alignment) * alignment
    for name, tensor in tensors.items():
        if start + tensor.start + tensor.size > reader.size:
            raise ValueError(f"puts tensor {name!r} behind its end (cut short?)")
        if tensor.start % alignment:
            raise ValueError(f"puts tensor {name!r} where it is not aligned")
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size))
    for (name, tensor), (other, following) in pairwise(ordered):
        if tensor.start + tensor.size > following.start:
            raise ValueError(f"puts tensors {name!r} and {other!r} in one place")
    return {name: replace(tensor, start=start + tensor.start) for name, tensor in tensors.items()}


def parts_of(path: Path) -> list[Path]:
    """The files that make up a model, in order; ``path`` alone where it is not split.

    Raises:
        ModelError: a file is damaged, ``path`` is not the first part, or a part is missing.
    """
    metadata = read_gguf_header(path).metadata
    count = metadata.get(_SPLIT_COUNT, 0)
    if not isinstance(count, int) or not 0 <= count < _MOST_PARTS:
        raise ModelError(f"{path}: gives {_SPLIT_COUNT} as {count!r}; fetch it again")
    if count <= 1:
        return [path]
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{path}: is one of {count} parts ({_SPLIT_COUNT}); name them as they were published, "
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
    promised = first.metadata.get(_SPLIT_TENSORS, len(tensors))
    if promised != len(tensors):
        raise ModelError(
            f"{path}: promises {promised} tensors ({_SPLIT_TENSORS}), and its parts hold {len(tensors)}; fetch them "
            "again"
        )
    try:
        check_blocks(first.metadata, len(tensors))
    except ValueError as error:
        raise ModelError(f"{path}: no usable GGUF file: it {error}; fetch it again") from error
    return GgufHeader(first.metadata, tensors)
