"""A run's Hessians as an importance matrix: the file that llama.cpp's quantizer takes with `--imatrix`.

The diagonal of X^T X holds the sums of squared inputs that `llama-imatrix` collects. Queries and keys lie in another
order of rows in a GGUF file, but importances belong to columns, so they stay as they are.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from evopress.artifacts.atomic import atomic_file
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, require_same_model
from evopress.artifacts.tables import LAYERS, read_provenance, read_table
from evopress.artifacts.tensors import check_tensors, read_tensors
from evopress.models.gguf_weights import names_in_gguf
from evopress.util.errors import ArtifactError

Form = Literal["gguf", "dat"]
"""What llama.cpp reads since 2025, and its binary form of before, which some forks still ask for."""


@dataclass(frozen=True)
class Imatrix:
    """What `llama-imatrix` would have collected."""

    sums: Mapping[str, NDArray[np.float32]]
    """Of the squares of each input, [columns], by the name of the weight in GGUF files."""
    chunks: int
    """Sequences of the calibration text."""
    chunk_size: int
    """Tokens of each."""
    text: str
    """What the calibration text is called."""

    @property
    def tokens(self) -> int:
        """That the sums are over."""
        return self.chunks * self.chunk_size


def imatrix_of(run: Run) -> Imatrix:
    """Collect the diagonals of a run's Hessians.

    Raises:
        ArtifactError: Hessians or layers are missing, damaged or of another model.
        UnsupportedArchitectureError: llama.cpp has no such model.
    """
    require_same_model(run, read_provenance(run.layers), run.layers)
    layers = read_table(run.layers, LAYERS)
    names = names_in_gguf(run.model, [f"{name}.weight" for name in layers["name"]])
    sums: dict[str, NDArray[np.float32]] = {}
    facts: dict[str, Any] = {}
    for block in sorted(set(layers["block"])):
        path = run.hessian(block)
        if not path.exists():
            raise ArtifactError(
                f"{path}: missing; run the Hessians first, with `hessians: {{keep: true}}` so that they stay"
            )
        manifest = check_tensors(path)
        provenance = Provenance(**manifest["provenance"])
        require_same_model(run, provenance, path)
        hessians, facts = read_tensors(path), {**manifest["facts"], **json.loads(provenance.settings)}
        for row in layers[layers["block"] == block].to_dict("records"):
            sums[names[f"{row['name']}.weight"]] = hessians[row["input_group"]].diagonal().float().numpy()
    text = facts.get("calibration", {})
    called = text.get("path") or text.get("id") or text.get("source") or "calibration"
    return Imatrix(sums, facts["sequences"], facts["tokens"] // facts["sequences"], called)


def write_imatrix(imatrix: Imatrix, path: Path, form: Form = "gguf") -> None:
    """Write an imatrix whole.

    Raises:
        ArtifactError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        if form == "gguf":
            _write_gguf(imatrix, temporary)
        else:
            temporary.write_bytes(_legacy(imatrix))


def _write_gguf(imatrix: Imatrix, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [imatrix.text])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, imatrix.chunks)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, imatrix.chunk_size)
    for name, sums in sorted(imatrix.sums.items()):
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(sums[None]))
        writer.add_tensor(f"{name}.counts", np.array([[imatrix.tokens]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _legacy(imatrix: Imatrix) -> bytes:
    """For each weight its name, the number of chunks n, and n times the mean squares; then n and the text."""
    parts = [struct.pack("<i", len(imatrix.sums))]
    for name, sums in sorted(imatrix.sums.items()):
        values = (sums.astype(np.float64) / imatrix.tokens * imatrix.chunks).astype("<f4")
        parts += [_counted(name), struct.pack("<2i", imatrix.chunks, len(values)), values.tobytes()]
    return b"".join([*parts, struct.pack("<i", imatrix.chunks), _counted(imatrix.text)])


def _counted(text: str) -> bytes:
    """A text after its number of bytes."""
    encoded = text.encode()
    return struct.pack("<i", len(encoded)) + encoded
