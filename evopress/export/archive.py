"""A compact archive of a compressed model: every searched layer as it is packed, the rest as it is, in one file.

A safetensors file whose header says how the packed layers decode. It holds weights only: configuration, tokenizer and
license are in the model's folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evopress.artifacts.atomic import atomic_file
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import PROVENANCE_KEY, Provenance
from evopress.artifacts.tables import read_provenance
from evopress.artifacts.tensors import save, tensor_digest
from evopress.compression.formats import decode
from evopress.export.run import open_stores, read_dropped, stitched_layout, stored_choices
from evopress.models.checkpoint import Checkpoint
from evopress.models.verify import check_model, check_weight
from evopress.search.configuration import read_configuration
from evopress.util.errors import ArtifactError
from evopress.util.progress import log

_HEADER = "evopress.packed"
"""Key of the header's JSON: for each packed tensor its format, shape and type."""
_DIGEST = "evopress.sha256"
"""Key of the digest of everything else, the header's other entries included."""


def write_archive(run: Run, search: str, *, trust_remote_code: bool = False) -> None:
    """Write ``run.archive(search)`` from a configuration, its variants and the dense model.

    The whole archive is held in memory while it is written. Of dropped modules it holds what the stitched model does.

    Raises:
        ArtifactError: the configuration or a variant is missing, damaged or of another model, or the disk is full.
        ModelError: the dense checkpoint is damaged.
        UnsupportedArchitectureError: this architecture cannot do without what was dropped.
    """
    configuration = read_configuration(run, search)
    checkpoint = Checkpoint(run.model)
    layout = stitched_layout(run, checkpoint, read_dropped(run, configuration), trust_remote_code=trust_remote_code)
    digests = check_model(run)
    choices = {
        name: choice
        for name, choice in stored_choices(checkpoint, configuration, run.configuration(search)).items()
        if name in layout.names and name not in layout.zeroed
    }
    stores = open_stores(run, choices)
    unpacked = checkpoint.read([name for name in layout.names if name not in choices])
    tensors = {
        layout.names[name]: torch.zeros_like(dense)
        if name in layout.zeroed
        else check_weight(run, digests, name, dense)
        for name, dense in unpacked.items()
    }
    packed: dict[str, dict[str, object]] = {}
    for name, choice in choices.items():
        store, key = stores[choice.variants], (choice.block, choice.layer, choice.level)
        dense, stored = checkpoint.read([name])[name], layout.names[name]
        packed[stored] = {
            "format": store.format(*key),
            "shape": list(dense.shape),
            "dtype": str(dense.dtype).removeprefix("torch."),
        }
        tensors |= {f"{stored}/{part}": tensor for part, tensor in store.packed(*key).items()}
    path = run.archive(search)
    chosen_by = read_provenance(run.configuration(search))
    provenance = Provenance("archive", chosen_by.settings, chosen_by.model)
    metadata = {_HEADER: json.dumps(packed, sort_keys=True), PROVENANCE_KEY: provenance.dumps()}
    with atomic_file(path) as temporary:
        save(tensors, temporary, metadata=metadata | {_DIGEST: _digest(tensors, metadata)})
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)


def load_archive(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All weights of an archive by name, as the stitched model's checkpoint holds them; for `load_state_dict`.

    Raises:
        ArtifactError: missing, cut short, changed, or no archive.
    """
    with _errors_named(path):
        return dict(_unpacked(*_read(path), device))


def verify_archive(path: Path) -> None:
    """Read an archive whole and compare it with its digest.

    Raises:
        ArtifactError: missing, cut short, changed, or no archive.
    """
    with _errors_named(path):
        _read(path)


def _read(path: Path) -> tuple[dict[str, dict[str, object]], dict[str, Tensor]]:
    """How packed layers decode, and the stored tensors, which are views of the mapped file."""
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
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; write the archive first") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: damaged or cut short ({error}); write the archive again") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no archive of a compressed model ({error!r})") from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    content = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([content, dict(metadata)], sort_keys=True).encode()).hexdigest()


def _unpacked(
    packed: Mapping[str, Mapping[str, object]], stored: Mapping[str, Tensor], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
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
        yield name, decode(str(facts["format"]), parts[name], _shape(facts["shape"]), dtype, device)


def _shape(sizes: object) -> tuple[int, int]:
    if not isinstance(sizes, list) or [type(size) for size in sizes] != [int, int]:
        raise ValueError(f"a weight of shape {sizes}")
    return sizes[0], sizes[1]
