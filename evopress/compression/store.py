"""Reading the variants of all blocks: tables, packed tensors by memory map, weights unpacked on demand."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evopress.artifacts.manifest import damaged, remade_with
from evopress.artifacts.paths import EMBEDDING, Run, manifest_path
from evopress.artifacts.provenance import Provenance, require_same_model
from evopress.artifacts.tables import LAYERS, VARIANTS, read_provenance, read_table, settings_of
from evopress.artifacts.tensors import check_tensors, differing, tensor_digest, unreadable
from evopress.compression.formats import decode
from evopress.util.errors import ArtifactError

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header."""


def tensor_name(layer: str, level: str, part: str) -> str:
    """Name of a part in a block's file of variants."""
    return f"{layer}/{level}/{part}"


class VariantStore:
    """The variants of all blocks of a model; files stay open and are mapped, not read.

    Args:
        run: the run.
        variants: their name.
        verify: whether to compare each tensor that is read with its digest.
        polished: a search that picked from them; what is read then is the levels that it chose, as its polish has made
            them.

    Raises:
        ArtifactError: a block is missing or damaged, was made by other settings than the rest, or for another model.
    """

    def __init__(self, run: Run, variants: str, *, verify: bool = False, polished: str | None = None) -> None:
        self.run, self.variants, self.verify, self.polished = run, variants, verify, polished
        layers = read_table(run.layers, LAYERS)
        blocks = sorted(int(block) for block in layers["block"].unique())
        with self._reading(blocks[0]):
            embedding = _of_embedding(self._table_path(blocks[0]))
        self.parts: list[int | str] = [*blocks, *embedding]
        """What files there are: of blocks, and of `EMBEDDING` where it is compressed."""
        tables = list(map(self._read_table, self.parts))
        self.table: pd.DataFrame = pd.concat(tables, ignore_index=True)
        """Rows of the VARIANTS schema, in the order of blocks; layers that stay dense are absent."""
        self._blocks = range(len(blocks))
        manifests = self._check()
        self._digests = {part: manifest["tensors"] for part, manifest in manifests.items()}
        keys = zip(self.table["block"], self.table["layer"], self.table["level"], strict=True)
        self._formats: dict[tuple[int, str, str], str] = dict(zip(keys, self.table["format"], strict=True))
        shapes = zip(layers["block"], layers["layer"], layers["rows"], layers["columns"], strict=True)
        self.shapes = {(block, layer): (int(rows), int(columns)) for block, layer, rows, columns in shapes}
        """Rows and columns of each layer, by block and name."""
        if EMBEDDING in manifests:
            outer = manifests[EMBEDDING]["facts"]["shapes"]
            places = self.table[~self.table["block"].isin(self._blocks)].drop_duplicates("layer")
            for block, layer in zip(places["block"], places["layer"], strict=True):
                self.shapes[block, layer] = outer[layer][0], outer[layer][1]
        self._open: dict[int | str, tuple[Any, dict[tuple[str, str], list[str]]]] = {}
        self._ahead: dict[int | str, ReadAhead] = {}

    def packed(self, block: int, layer: str, level: str) -> dict[str, Tensor]:
        """Packed parts of a layer at a level, mapped from the file.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        self._require(block, layer, level)
        stream, parts = self._stream(block)
        path = self._path(self._file(block))
        try:
            tensors = {part: stream.get_tensor(tensor_name(layer, level, part)) for part in parts[layer, level]}
        except (KeyError, SafetensorError) as error:
            raise ArtifactError(f"{path}: lacks {layer} at level {level} ({error}); delete it and run again") from error
        if self.verify:
            named = {tensor_name(layer, level, part): tensor for part, tensor in tensors.items()}
            digests = self._digests[self._file(block)]
            if reason := differing(name for name, tensor in named.items() if tensor_digest(tensor) != digests[name]):
                with self._reading(self._file(block)):
                    raise damaged(path, reason, path, manifest_path(path))
        return tensors

    def format(self, block: int, layer: str, level: str) -> str:
        """How the parts of a layer at a level decode.

        Raises:
            ArtifactError: there is no such variant.
        """
        self._require(block, layer, level)
        return self._formats[block, layer, level]

    def weight(
        self, block: int, layer: str, level: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Weights [rows, columns] of a layer at a level, unpacked on ``device``.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        parts = self.packed(block, layer, level)
        return decode(self._formats[block, layer, level], parts, self.shapes[block, layer], dtype, device)

    def shape(self, block: int, layer: str) -> tuple[int, int]:
        """Rows and columns of a layer."""
        return self.shapes[block, layer]

    def read_ahead(self, block: int, variants: Sequence[tuple[str, str]]) -> None:
        """Have the system read variants of a block, (layer, level) each, from disk without waiting for them.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        parts, file = self._stream(block)[1], self._file(block)
        if file not in self._ahead:
            self._ahead[file] = ReadAhead(self._path(file))
        for layer, level in variants:
            self._require(block, layer, level)
            self._ahead[file].ask([tensor_name(layer, level, part) for part in parts[layer, level]])

    def _file(self, block: int) -> int | str:
        """What the file is of that holds the variants of a block."""
        return block if block in self._blocks else EMBEDDING

    def _path(self, block: int | str) -> Path:
        """File of a block's tensors; embedding and head are never polished."""
        if self.polished is not None and isinstance(block, int):
            return self.run.polished_tensors(self.polished, block)
        return self.run.variant_tensors(self.variants, block)

    def _table_path(self, block: int | str) -> Path:
        return self._path(block).with_suffix(".parquet")

    def _read_table(self, block: int | str) -> pd.DataFrame:
        with self._reading(block):
            return read_table(self._table_path(block), VARIANTS)

    def _reading(self, block: int | str) -> AbstractContextManager[None]:
        """To enclose the reading of a block's files: without one of them, the polish that has made it is not done."""
        if self.polished is None or not isinstance(block, int):
            return nullcontext()
        path = self._path(block)
        return remade_with(self.run.polish_effort(self.polished), path, manifest_path(path), self._table_path(block))

    def _require(self, block: int, layer: str, level: str) -> None:
        if (block, layer, level) not in self._formats:
            levels = [known for *where, known in self._formats if where == [block, layer]]
            raise ArtifactError(
                f"variants {self.variants!r}: block {block} has no {layer} at level {level}; "
                + (f"its levels are {', '.join(levels)}" if levels else "that layer stays dense")
            )

    def _stream(self, block: int) -> tuple[Any, dict[tuple[str, str], list[str]]]:
        """The open file of a block, and the names of each variant's parts."""
        file = self._file(block)
        if file not in self._open:
            path = self._path(file)
            try:
                stream = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                with self._reading(file):
                    raise unreadable(path, error) from error
            parts: dict[tuple[str, str], list[str]] = {}
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                layer, level, part = name.rsplit("/", 2)
                parts.setdefault((layer, level), []).append(part)
            self._open[file] = stream, parts
        return self._open[file]

    def _check(self) -> dict[int | str, dict[str, Any]]:
        """Check that all parts are there, made alike and for the model in the run's folder; returns their manifests."""
        manifests: dict[int | str, dict[str, Any]] = {}
        made_by: dict[int | str, tuple[str, str]] = {}
        for block in self.parts:
            path = self._path(block)
            table = self._table_path(block)
            with self._reading(block):
                manifest, of_table = check_tensors(path), read_provenance(table)
            manifests[block], provenance = manifest, Provenance(**manifest["provenance"])
            require_same_model(self.run, provenance, path)
            if of_table != provenance:
                raise ArtifactError(f"{table}: made by other settings than {path}; delete both and run again")
            made_by[block] = provenance.settings, str(manifest["facts"].get("hessians"))
        usual = Counter(made for part, made in made_by.items() if part != EMBEDDING).most_common(1)[0][0]
        if EMBEDDING in made_by:  # it is never polished, and has one Hessian, whatever the blocks were calibrated on
            made_by[EMBEDDING] = usual[0] if self.polished else made_by[EMBEDDING][0], usual[1]
        odd = [str(block) for block in self.parts if made_by[block] != usual]
        if odd:
            raise ArtifactError(
                f"variants {self.variants!r}: blocks {', '.join(odd)} were made by other settings than the others; "
                f"delete {self._path(0).parent} and run again"
            )
        return manifests


def _of_embedding(table: Path) -> list[str]:
    """`EMBEDDING` if the settings that a table of variants records ask for its levels, too."""
    return [EMBEDDING] if settings_of(table).get("embedding") else []


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
        """Have the kernel read tensors into its cache; returns at once. Does nothing where there is no such call."""
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
