"""safetensors files with a manifest (sha256, bytes, provenance) beside each."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evopress.artifacts.atomic import atomic_files
from evopress.artifacts.damage import damaged
from evopress.artifacts.manifest import load_manifest, manifest_text
from evopress.artifacts.paths import manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.util.errors import ArtifactError

_CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "provenance": json.loads(provenance.dumps()),
        "facts": dict(facts or {}),
    }
    manifest.write_text(manifest_text(content), encoding="utf-8")


def read_manifest(path: Path) -> dict:
    """Manifest of the safetensors file ``path``.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    manifest = manifest_path(path)
    content = load_manifest(manifest)
    if not {"sha256", "bytes", "provenance"} <= content.keys():
        raise damaged(manifest, "lacks sha256, bytes or provenance")
    return content


def verify(path: Path) -> dict:
    """Check size and digest against the manifest and return the manifest.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    manifest = read_manifest(path)
    if not path.exists():
        raise ArtifactError(f"{path}: missing; run the stage that writes it")
    while path.stat().st_size != manifest["bytes"] or sha256(path) != manifest["sha256"]:
        before, manifest = manifest, read_manifest(path)
        if manifest == before:  # else another writer has replaced both between the two looks
            raise damaged(path, "differs from its manifest", path, manifest_path(path))
    return manifest


def read_tensors(
    path: Path, names: Iterable[str] | None = None, *, device: str = "cpu", check: bool = True
) -> dict[str, torch.Tensor]:
    """Read tensors, all or those named, after checking the file against its manifest.

    Raises:
        ArtifactError: missing, or without a tensor that was asked for.
        DamagedError: cut short or changed.
    """
    if check:
        verify(path)
    try:
        with safe_open(path, framework="pt", device=device) as stream:
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
