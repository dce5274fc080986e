"""Asking the system to read parts of a safetensors file from disk before they are needed."""

import json
import os
from contextlib import suppress
from pathlib import Path

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header."""


class ReadAhead:
    """Where the tensors of a file lie; asking for them costs no memory of this process and no time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
        self.start = _LENGTH_BYTES + length
        self.places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}

    def ask(self, names: list[str]) -> None:
        """Have the kernel read tensors into its cache; returns at once. Does nothing where the system cannot."""
        if not hasattr(os, "posix_fadvise"):
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for name in names:
                begin, end = self.places[name]
                with suppress(OSError):  # file systems that keep no cache
                    os.posix_fadvise(descriptor, self.start + begin, end - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
