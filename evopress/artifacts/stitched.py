"""Manifest of a stitched model: digest and size of each file, written once the folder is whole."""

import json
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import write_text
from evopress.artifacts.consistency import require_same_model
from evopress.artifacts.damage import damaged
from evopress.artifacts.manifest import load_manifest, manifest_text
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import sha256


def file_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """sha256 and bytes of every file below ``folder``, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }


def write_stitched_manifest(
    run: Run, search: str, files: dict[str, dict[str, str | int]], provenance: Provenance
) -> None:
    """Write the manifest of a stitched model whose files are ``files``.

    Raises:
        ArtifactError: it cannot be written.
    """
    write_folder_manifest(run.stitched_manifest(search), search, files, provenance)


def write_folder_manifest(
    path: Path, search: str, files: dict[str, dict[str, str | int]], provenance: Provenance
) -> None:
    """Write the manifest of a model's folder in any layout.

    Raises:
        ArtifactError: it cannot be written.
    """
    content = {"files": files, "provenance": json.loads(provenance.dumps()), "search": search}
    write_text(path, manifest_text(content))


def read_stitched_manifest(run: Run, search: str) -> dict[str, Any]:
    """Manifest of a stitched model, after checking that it belongs to the model in ``results``.

    Sizes of the files are checked; digests are left to `model_folder`, since all weights are read for it.

    Raises:
        ArtifactError: missing, or made for another model.
        DamagedError: the manifest is damaged, or a file is missing or cut short.
    """
    path = run.stitched_manifest(search)
    content = load_manifest(path, "stitch")
    try:
        provenance = Provenance(**content["provenance"])
        sizes = {name: facts["bytes"] for name, facts in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, repr(error)) from error
    require_same_model(run, provenance, path)
    for name, size in sizes.items():
        file = run.stitched(search) / name
        if not file.exists() or file.stat().st_size != size:
            raise damaged(file, "missing or cut short", path)  # without its manifest the folder is written anew
    return content


def model_folder(run: Run, search: str) -> Path:
    """Hugging Face folder of a search's model or of the dense one, after checking the former against its manifest.

    Raises:
        ArtifactError: the stitched model is missing, or of another model.
        DamagedError: a file is missing, cut short or changed.
    """
    if search == DENSE:
        return run.model
    files = read_stitched_manifest(run, search)["files"]
    for name, facts in files.items():
        file = run.stitched(search) / name
        if sha256(file) != facts["sha256"]:
            raise damaged(file, "differs from its manifest", run.stitched_manifest(search))
    return run.stitched(search)
