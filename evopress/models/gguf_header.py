"""Metadata of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), read with every length checked against the file.

The gguf library trusts the lengths that a file claims; this check comes before it, so a damaged or hostile header ends
in an error and not in an endless loop or a huge allocation. It imports nothing heavy.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from evopress.errors import ModelError

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8


@dataclass
class _Reader:
    """Little-endian values from a stream, never more than the file holds."""

    stream: BinaryIO
    size: int

    def take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise ValueError(f"claims {count} bytes where {self.size - self.stream.tell()} are left")
        return self.stream.read(count)

    def scalar(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of metadata; of an array, only the number of elements."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._skip_array()
        raise ValueError(f"has a value of unknown type {kind}")

    def _skip_array(self) -> int:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
        else:
            raise ValueError(f"has an array of type {kind}")
        return count


def read_gguf_header(path: Path) -> Mapping[str, Any]:
    """Metadata by key; arrays are given by their number of elements.

    Raises:
        ModelError: missing, no GGUF, cut short or with a header that does not fit the file.
    """
    try:
        with path.open("rb") as stream:
            return _read(_Reader(stream, path.stat().st_size))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; check the path of the GGUF file") from None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: no usable GGUF file: it {error}; fetch it again") from error


def _read(reader: _Reader) -> dict[str, Any]:
    magic = reader.take(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"starts with {magic!r}, not {_MAGIC!r}")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"is of version {version}, and versions 2 and 3 can be read")
    tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    for _ in range(tensors):
        name, dimensions = reader.string(), reader.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"gives tensor {name!r} {dimensions} dimensions")
        reader.take(8 * dimensions + 4)
        if reader.scalar("Q") >= reader.size:
            raise ValueError(f"puts tensor {name!r} behind its end (cut short?)")
    return metadata
