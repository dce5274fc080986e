"""Whether the dense model is still what the model stage has read: a digest for each tensor, so that a job that needs
one block reads no more than that.
"""

from collections.abc import Iterable

from evopress.artifacts.damage import damaged
from evopress.artifacts.manifest import load_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.tensors import sha256, tensor_digest
from evopress.models.checkpoint import Checkpoint


def tensor_digests(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, str]:
    """sha256 of type, shape and content of stored tensors, all or those named, one in memory at a time.

    Raises:
        ModelError: a tensor is missing, or its file cannot be read.
    """
    return {
        name: tensor_digest(checkpoint.read([name])[name]) for name in (checkpoint.names() if names is None else names)
    }


def require_intact(run: Run, parameters: Iterable[str] | None = None) -> None:
    """Check the dense model, or parameters of it, and its small files against its manifest.

    Raises:
        DamagedError: a file or a tensor has changed since the model stage; only the manifest is to go, since weights
            may be links to files that are not ours.
    """
    manifest = load_manifest(run.model_manifest, "model")
    expected = manifest.get("tensors", {})
    for name, facts in manifest.get("files", {}).items():
        file = run.model / name
        changed = not file.exists() or file.stat().st_size != facts["bytes"]
        if changed or (file.suffix != ".safetensors" and sha256(file) != facts["sha256"]):
            raise damaged(file, "missing or changed", run.model_manifest)
    if expected:
        checkpoint = Checkpoint(run.model)
        stored = None if parameters is None else [checkpoint.stored_name(name) or name for name in parameters]
        for name, digest in tensor_digests(checkpoint, stored).items():
            if expected.get(name) != digest:
                raise damaged(run.model, f"{name} differs from its checksum", run.model_manifest)
