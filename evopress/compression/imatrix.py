"""Importance matrices of llama.cpp, read: the mean square of each input of a weight, seen on calibration text.

`llama-imatrix` writes a GGUF file with the tensors `<weight>.in_sum2` and `<weight>.counts` (sums of squares, and the
tokens that they are over), or, before 2025, a binary form of its own. Both are read here, with every number checked
against the file, since such files come from anywhere.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.models.gguf_header import read_gguf_header
from evopress.models.gguf_weights import names_in_gguf, read_tensor
from evopress.util.errors import ConfigError, ModelError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 16


def diagonal_hessians(path: Path, model: Path, layers: pd.DataFrame, block: int) -> dict[str, Tensor]:
    """The Hessian of each input group of a block as far as an imatrix knows it: a diagonal, [columns, columns].

    Args:
        path: of the imatrix.
        model: folder of the model.
        layers: all linear layers of the model, LAYERS schema.
        block: index of the block.

    Raises:
        ConfigError: the file cannot be read, or belongs to another model; the message begins with `imatrix: `.
        UnsupportedArchitectureError: llama.cpp has no such model.
    """
    try:
        squares = read_imatrix(path)
    except (ModelError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"imatrix: {path}: cannot be read ({error}); make it again with llama-imatrix") from error
    first = layers.drop_duplicates(["block", "input_group"])
    names = names_in_gguf(model, [f"{name}.weight" for name in first["name"]])
    columns = {names[f"{row['name']}.weight"]: row["columns"] for row in first.to_dict("records")}
    _require_fit(path, squares, columns, int(layers["block"].max()) + 1)
    own = first[first["block"] == block].to_dict("records")
    return {row["input_group"]: torch.from_numpy(squares[names[f"{row['name']}.weight"]]).diag() for row in own}


def _require_fit(path: Path, squares: dict[str, NDArray[np.float32]], columns: dict[str, int], blocks: int) -> None:
    """Refuse an imatrix of another model.

    Args:
        path: for messages.
        squares: what it holds.
        columns: of each weight that it must hold.
        blocks: of the model.
    """
    about = f"imatrix: {path}: belongs to another model than this one"
    for name in squares:
        block = re.match(r"blk\.(\d+)\.", name)
        if block is not None and int(block[1]) >= blocks:
            raise ConfigError(f"{about}: it has {name}, and the model {blocks} blocks; make one with this model")
    for name, count in columns.items():
        if name not in squares:
            raise ConfigError(f"{about}: it lacks {name}; make one with this model")
        if len(squares[name]) != count:
            raise ConfigError(
                f"{about}: it has {len(squares[name])} inputs for {name}, which has {count}; make one with this model"
            )


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Mean squares (float32 [columns]; of several experts one after the other) by the name of the weight in GGUF files.

    Raises:
        ModelError: the file is missing, or a damaged GGUF file.
        ValueError: it is no imatrix, or damaged.
        NotImplementedError: its numbers are of a type that is not known.
    """
    try:
        with path.open("rb") as stream:
            in_gguf = stream.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(str(error)) from error
    squares = _read_gguf(path) if in_gguf else _read_legacy(path.read_bytes())
    for name, values in squares.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} has a mean square that is negative or no number")
    return squares


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = read_gguf_header(path).tensors
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise ValueError("it is a GGUF file, but holds no imatrix")
    squares = {}
    for name in names:
        if name + _COUNTS not in tensors:
            raise ValueError(f"{name} has sums without counts")
        sums = read_tensor(tensors[name + _SUMS]).numpy()
        counts = read_tensor(tensors[name + _COUNTS]).numpy().reshape(-1, 1)
        sums = sums.reshape(len(counts), -1)
        # As llama.cpp has it: what no token has reached counts evenly.
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        squares[name] = np.ascontiguousarray(means.reshape(-1))
    return squares


def _read_legacy(data: bytes) -> dict[str, NDArray[np.float32]]:
    """The form before 2025: for each weight its name, a number n, and n times the mean squares."""
    place = 0

    def take(count: int) -> bytes:
        """The next bytes of the file."""
        nonlocal place
        if not 0 <= count <= len(data) - place:
            raise ValueError(f"it claims {count} bytes where {len(data) - place} are left")
        place += count
        return data[place - count : place]

    def integers(count: int) -> Sequence[Any]:
        """The next numbers of 32 bits."""
        return struct.unpack(f"<{count}i", take(4 * count))

    (entries,) = integers(1)
    if entries < 1:
        raise ValueError(f"it has {entries} entries")
    squares = {}
    for _ in range(entries):
        (length,) = integers(1)
        name = take(min(length, _LONGEST_NAME)).decode("utf-8")
        calls, count = integers(2)
        values = np.frombuffer(take(4 * count), "<f4").astype(np.float32)
        squares[name] = values / calls if calls > 0 else values
    return squares
