"""Whether the dense model is still what the model stage has read (docs/integrity.md).

The manifest holds the size of every file, a digest of each small one, and one of each tensor. Weights are often links
to files that are not ours, in the user's folder or the hub's cache, where they may change. So a link is given the
modification time of the file that it led to when that was hashed: while the two times are equal the file counts as
unchanged, and where they differ it is hashed again.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from evopress.artifacts.manifest import WEIGHTS_SUFFIX, damaged, damaged_files, load_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.tensors import differing, tensor_digest
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import DamagedError
from evopress.util.progress import log


def tensor_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of type, shape and content of each stored tensor, one in memory at a time.

    Raises:
        ModelError: a file cannot be read.
    """
    return {name: tensor_digest(checkpoint.read([name])[name]) for name in checkpoint.names()}


def mark_links(folder: Path) -> None:
    """Give each link to weights the modification time of its file; to be called before these are hashed.

    A link that cannot take it (another user's, or on a file system that keeps no such times) is hashed by each job.
    """
    _mark({link: link.stat().st_mtime_ns for link in _links(folder)})


def check_model(run: Run) -> dict[str, str]:
    """Check the dense model against its manifest without reading its weights; returns the digests of its tensors.

    Sizes, digests of the small files, and modification times of linked weights are compared; weights are hashed only
    where such a time differs.

    Raises:
        DamagedError: a file or a tensor has changed since the model stage; only the manifest is to go, since weights
            may be links to files that are not ours.
    """
    manifest = load_manifest(run.model_manifest, "model")
    for error in damaged_files(run.model, manifest.get("files", {}), run.model_manifest):
        raise error
    touched = [link for link in _links(run.model) if link.lstat().st_mtime_ns != link.stat().st_mtime_ns]
    if touched:
        log.info("%s: has another time than when it was hashed; hashing the weights again", touched[0].resolve())
        times = {link: link.stat().st_mtime_ns for link in touched}
        for error in _damaged_tensors(run, manifest):
            raise error
        _mark(times)
    return manifest.get("tensors", {})


def verify_model(run: Run) -> list[DamagedError]:
    """Read every file of the dense model and compare it with its digest; returns an error for each that differs.

    Raises:
        ArtifactError: the manifest is missing or damaged.
        ModelError: a file cannot be read.
    """
    manifest = load_manifest(run.model_manifest, "model")
    found = list(damaged_files(run.model, manifest.get("files", {}), run.model_manifest))
    return found or _damaged_tensors(run, manifest)


def check_weight(run: Run, digests: Mapping[str, str], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The stored tensor ``name`` as it was read, after comparing it with its digest, for what is handed on for good.

    Raises:
        DamagedError: it differs.
    """
    if digests and digests.get(name) != tensor_digest(weight):
        raise damaged(run.model, differing([name]), run.model_manifest)
    return weight


def _damaged_tensors(run: Run, manifest: Mapping[str, Any]) -> list[DamagedError]:
    if not (expected := manifest.get("tensors", {})):
        return []
    found = tensor_digests(Checkpoint(run.model))
    reason = differing(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [damaged(run.model, reason, run.model_manifest)] if reason else []


def _mark(times: Mapping[Path, int]) -> None:
    for link, time in times.items():
        with suppress(OSError):
            os.utime(link, ns=(time, time), follow_symlinks=False)


def _links(folder: Path) -> list[Path]:
    """Weights that are links."""
    return [path for path in sorted(folder.glob(f"*{WEIGHTS_SUFFIX}")) if path.is_symlink()]
