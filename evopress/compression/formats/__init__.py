"""How packed weights are stored: the formats, and reading one by the name that tables record."""

from collections.abc import Mapping

import torch
from torch import Tensor

from evopress.compression.base import Format
from evopress.compression.formats.bitmask import BitmaskFormat
from evopress.compression.formats.gguf import GgufFormat
from evopress.compression.formats.integer import IntegerFormat
from evopress.compression.formats.sparse_integer import SparseIntegerFormat
from evopress.util.errors import ArtifactError

FORMATS: list[type[Format]] = [IntegerFormat, BitmaskFormat, SparseIntegerFormat, GgufFormat]
"""All there are; append another one to it."""


def parse(text: str) -> Format:
    """The format of this name.

    Raises:
        ArtifactError: there is none.
    """
    for kind in FORMATS:
        if found := kind.parse(text):
            return found
    raise ArtifactError(f"{text!r} is not a format of packed weights; was it written by a newer version?")


def decode(
    format: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weights [rows, columns] from their packed parts, of any format, on ``device`` and in ``dtype``.

    The parts are moved before they are unpacked: packed they are smaller.

    Raises:
        ArtifactError: the format is unknown, or the parts do not fit each other.
    """
    moved = {name: part.to(device) for name, part in parts.items()}
    return parse(format).decode(moved, shape, dtype)
