"""safetensors files with a manifest (size, a digest of each tensor, provenance) beside each.

Each tensor is hashed once, when it is written. Readers compare the size and the names in the header, which costs
nothing; who hands a tensor on for good (an export), or asks (`evopress verify`), compares its digest as well.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evopress.artifacts.atomic import atomic_files
from evopress.artifacts.manifest import damaged, load_manifest, manifest_text
from evopress.artifacts.paths import manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.util.errors import ArtifactError, DamagedError, brief


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of type, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a bare safetensors file in place; for use inside an atomic write, which explains an OSError.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise os_error(error) from error


def os_error(error: Exception) -> OSError:
    """What the system said, which safetensors tells only in words."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, provenance: Provenance, facts: Mapping[str, object] | None = None
) -> None:
    """Write tensors and their manifest; ``facts`` are JSON values kept in the manifest.

    The manifest is written last, so a file without one is not finished.

    Raises:
        ArtifactError: the file cannot be written.
    """
    with atomic_files(path, manifest_path(path)) as (temporary, manifest):
        save_tensors(tensors, temporary, manifest, provenance, facts)


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    manifest: Path,
    provenance: Provenance,
    facts: Mapping[str, object] | None = None,
) -> None:
    """Write tensors and their manifest in place; for use inside an atomic write, which explains an OSError.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    save(tensors, path)
    content = {
        "bytes": path.stat().st_size,
        "tensors": {name: tensor_digest(tensor) for name, tensor in tensors.items()},
        "provenance": json.loads(provenance.dumps()),
        "facts": dict(facts or {}),
    }
    manifest.write_text(manifest_text(content), encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of the safetensors file ``path``.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    manifest = manifest_path(path)
    content = load_manifest(manifest)
    if not {"bytes", "tensors", "provenance"} <= content.keys():
        raise damaged(manifest, "lacks bytes, tensors or provenance")
    return content


def check_tensors(path: Path) -> dict[str, Any]:
    """Check the size and the header of a file against its manifest, and return the manifest; no tensor is read.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short, or of another size or header.
    """
    return _compare(path, _difference)


def facts_made_by(path: Path, provenance: Provenance, facts: Mapping[str, object]) -> dict[str, Any]:
    """Facts of a file that is whole and was made with ``provenance`` and ``facts``; it may hold more facts.

    Raises:
        ArtifactError: missing, damaged, or made by or of something else.
    """
    manifest = check_tensors(path)
    own: dict[str, Any] = manifest["facts"]
    if Provenance(**manifest["provenance"]) != provenance or any(own.get(name) != fact for name, fact in facts.items()):
        raise ArtifactError(f"{path}: made by other settings, or of something else")
    return own


def verify_tensors(path: Path) -> dict[str, Any]:
    """Check every tensor of a file as well; it is read whole.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    return _compare(path, lambda path, manifest: _difference(path, manifest) or _changed_tensors(path, manifest))


def _compare(path: Path, difference: Callable[[Path, dict[str, Any]], str]) -> dict[str, Any]:
    """The manifest of ``path``, if ``difference`` finds none between the two."""
    manifest = read_manifest(path)
    if not path.exists():
        raise ArtifactError(f"{path}: missing; run the stage that writes it")
    while reason := _told(difference, path, manifest):
        before, manifest = manifest, read_manifest(path)
        if manifest == before:  # else another writer has replaced both between the two looks
            raise damaged(path, reason, path, manifest_path(path))
    return manifest


def _told(difference: Callable[[Path, dict[str, Any]], str], path: Path, manifest: dict[str, Any]) -> str:
    """What ``difference`` says, or the library that cannot read the file (torch's mapping has errors of its own).

    Raises:
        ArtifactError: only the system was unable to read it.
    """
    try:
        return difference(path, manifest)
    except (SafetensorError, OSError) as error:
        if not isinstance(told := unreadable(path, error), DamagedError):
            raise told from error
        return brief(error)
    except RuntimeError as error:
        return brief(error)


def _difference(path: Path, manifest: Mapping[str, Any]) -> str:
    """How size or header differ from the manifest; empty where they do not. The library checks that the two fit."""
    if (size := path.stat().st_size) != manifest["bytes"]:
        return f"holds {size} bytes instead of {manifest['bytes']}"
    with safe_open(path, framework="pt") as stream:
        names = set(stream.keys())
    return "" if names == manifest["tensors"].keys() else "holds other tensors than its manifest says"


def _changed_tensors(path: Path, manifest: Mapping[str, Any]) -> str:
    """Which tensors differ from their digests; empty where none does."""
    with safe_open(path, framework="pt") as stream:
        changed = [
            name for name, digest in manifest["tensors"].items() if tensor_digest(stream.get_tensor(name)) != digest
        ]
    return differing(changed)


def differing(names: Iterable[str]) -> str:
    """What to say of tensors that differ from their digests, the first ones by name; empty where none does."""
    named = sorted(names)
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{', '.join(named[:3])}{more} differ{'s' * (len(named) == 1)} from the checksum" if named else ""


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors, all or those named, after checking size and header of the file against its manifest.

    Raises:
        ArtifactError: missing, or without a tensor that was asked for.
        DamagedError: cut short, or of another size or header.
    """
    check_tensors(path)
    try:
        with safe_open(path, framework="pt") as stream:
            wanted = stream.keys() if names is None else names
            return {name: stream.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: SafetensorError | OSError) -> ArtifactError:
    """The error for a safetensors file that could not be read: it is damaged, unless only the system was unable."""
    number = os_error(error).errno
    if number == errno.ENODEV:
        return ArtifactError(
            f"{path}: cannot be mapped into memory, which this file system does not do; move the results to another"
        )
    if number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE) or (
        isinstance(error, FileNotFoundError) and path.exists()  # what safetensors says of any file it cannot open
    ):
        reason = os.strerror(number) if number else "it is there, but cannot be opened"
        return ArtifactError(f"{path}: cannot be read ({reason}); check permissions, `ulimit -n` and `ulimit -v`")
    return damaged(path, error, path, manifest_path(path))
