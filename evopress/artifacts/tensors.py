"""safetensors files with a manifest (sha256, bytes, provenance) beside each."""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evopress.artifacts.atomic import atomic_file, write_text
from evopress.artifacts.paths import manifest_path
from evopress.artifacts.provenance import Provenance
from evopress.errors import ArtifactError

_CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a bare safetensors file; for use inside an atomic write, which explains an OSError.

    Raises:
        OSError: the disk is full.
        ArtifactError: the file cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # safetensors hides the errno of a full disk
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise ArtifactError(f"{path}: cannot be written: {error}") from error


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, provenance: Provenance, facts: Mapping[str, object] | None = None
) -> None:
    """Write tensors and their manifest; ``facts`` are JSON values kept in the manifest.

    The manifest is written last, so a file without one is not finished.

    Raises:
        ArtifactError: the file cannot be written.
    """
    manifest_path(path).unlink(missing_ok=True)
    with atomic_file(path) as temporary:
        save(tensors, temporary)
        digest, size = sha256(temporary), temporary.stat().st_size
    manifest = {
        "sha256": digest,
        "bytes": size,
        "provenance": json.loads(provenance.dumps()),
        "facts": dict(facts or {}),
    }
    write_text(manifest_path(path), json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(path: Path) -> dict:
    """Manifest of the safetensors file ``path``.

    Raises:
        ArtifactError: missing or damaged.
    """
    manifest = manifest_path(path)
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        content["sha256"], content["bytes"], content["provenance"]
    except FileNotFoundError:
        raise ArtifactError(f"{manifest}: missing; run the stage that writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{manifest}: damaged ({error!r}); delete it and run again to remake it") from error
    return content


def verify(path: Path) -> dict:
    """Check size and digest against the manifest and return the manifest.

    Raises:
        ArtifactError: missing, cut short or changed.
    """
    manifest = read_manifest(path)
    if not path.exists():
        raise ArtifactError(f"{path}: missing; run the stage that writes it")
    if path.stat().st_size != manifest["bytes"] or sha256(path) != manifest["sha256"]:
        raise ArtifactError(f"{path}: damaged (differs from its manifest); delete it and run again to remake it")
    return manifest


def read_tensors(
    path: Path, names: Iterable[str] | None = None, *, device: str = "cpu", check: bool = True
) -> dict[str, torch.Tensor]:
    """Read tensors, all or those named, after checking the file against its manifest.

    Raises:
        ArtifactError: missing, damaged, or without a tensor that was asked for.
    """
    if check:
        verify(path)
    try:
        with safe_open(path, framework="pt", device=device) as stream:
            wanted = stream.keys() if names is None else names
            return {name: stream.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); delete it and run again to remake it") from error
