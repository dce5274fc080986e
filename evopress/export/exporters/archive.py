"""A compact archive: every searched layer as it is packed, the rest as it is, in one file.

A safetensors file whose header says how the packed layers decode. It holds weights only: configuration, tokenizer and
license are in the Hugging Face folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from evopress.export.base import Exporter
from evopress.util.errors import ArtifactError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from evopress.config.context import StageContext

ARCHIVE = "archive.safetensors"
"""Name of the file."""
_HEADER = "evopress.packed"
"""Key of the header's JSON: for each packed tensor its format, shape and type."""
_ZEROS = "zeros"
"""Format of what dropped modules hold where a block keeps the other one: it takes no bytes."""
_DIGEST = "evopress.sha256"
"""Key of the digest of everything else, the header's other entries included."""


class Archive(Exporter):
    """One safetensors file with every compressed layer packed, for storing; `load_archive` gives the weights back."""

    has_card: ClassVar[bool] = False

    exporter: Literal["archive"] = "archive"

    def write(self, context: "StageContext", search: str, folder: Path) -> None:
        """Write the file; the whole archive is held in memory meanwhile.

        Blocks that lost both modules are gone, as from the Hugging Face folder. Of other dropped modules it holds
        shapes only: they are zeros.
        """
        from evopress.artifacts.provenance import PROVENANCE_KEY, Provenance
        from evopress.artifacts.tables import read_provenance
        from evopress.artifacts.tensors import save
        from evopress.export.compressed import CompressedModel

        model = CompressedModel(context, search)
        names, checkpoint = model.layout.names, model.checkpoint
        idle = model.layout.idle
        unpacked = checkpoint.read([name for name in names if name not in model.choices and name not in idle])
        tensors = {names[name]: model.weight(name, dense) for name, dense in unpacked.items()}
        packed: dict[str, dict[str, object]] = {}
        for name in [*model.choices, *sorted(idle)]:
            dense = checkpoint.read([name])[name]
            form, parts = (_ZEROS, {}) if name in idle else model.packed(name)
            dtype = str(dense.dtype).removeprefix("torch.")
            packed[names[name]] = {"format": form, "shape": list(dense.shape), "dtype": dtype}
            tensors |= {f"{names[name]}/{part}": tensor for part, tensor in parts.items()}
        chosen_by = read_provenance(context.run.configuration(search))
        provenance = Provenance("archive", chosen_by.settings, chosen_by.model)
        metadata = {_HEADER: json.dumps(packed, sort_keys=True), PROVENANCE_KEY: provenance.dumps()}
        save(tensors, folder / ARCHIVE, metadata=metadata | {_DIGEST: _digest(tensors, metadata)})


def load_archive(path: Path, device: "torch.device | str" = "cpu") -> "dict[str, Tensor]":
    """All weights of an archive by name, as the Hugging Face folder's checkpoint holds them; for `load_state_dict`.

    Raises:
        ArtifactError: missing, cut short, changed, or no archive.
    """
    with _errors_named(path):
        return dict(_unpacked(*_read(path), device))


def _read(path: Path) -> "tuple[dict[str, dict[str, object]], dict[str, Tensor]]":
    """How packed layers decode, and the stored tensors, which are views of the mapped file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata() or {}
        stored = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    packed, digest = json.loads(metadata[_HEADER]), metadata.pop(_DIGEST, None)
    if digest not in (None, _digest(stored, metadata)):
        raise ArtifactError(f"{path}: damaged (differs from its checksum); write the archive again")
    return packed, stored


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Say of an archive what is wrong with it, whatever the reader says."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; write the archive first") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: damaged or cut short ({error}); write the archive again") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no archive of a compressed model ({error!r})") from error


def _digest(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> str:
    from evopress.artifacts.tensors import tensor_digest

    content = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([content, dict(metadata)], sort_keys=True).encode()).hexdigest()


def _unpacked(
    packed: Mapping[str, Mapping[str, object]], stored: "Mapping[str, Tensor]", device: "torch.device | str"
) -> "Iterator[tuple[str, Tensor]]":
    import torch

    from evopress.compression.formats import decode

    parts: dict[str, dict[str, Tensor]] = {name: {} for name in packed}
    for key, tensor in stored.items():
        name, _, part = key.rpartition("/")
        if name in parts:
            parts[name][part] = tensor
        else:
            yield key, tensor.to(device)
    for name, facts in packed.items():
        dtype = getattr(torch, str(facts["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a weight of type {facts['dtype']!r}")
        if facts["format"] == _ZEROS:
            yield name, torch.zeros(_sizes(facts["shape"]), dtype=dtype, device=device)
        else:
            yield name, decode(str(facts["format"]), parts[name], _shape(facts["shape"]), dtype, device)


def _shape(sizes: object) -> tuple[int, int]:
    if len(found := _sizes(sizes)) != 2:
        raise ValueError(f"a weight of shape {sizes}")
    return found[0], found[1]


def _sizes(sizes: object) -> list[int]:
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"a weight of shape {sizes}")
    return sizes
