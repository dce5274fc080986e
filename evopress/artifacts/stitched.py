"""Manifest of an exported model folder: digest and size of each file, written once the folder is whole."""

import json
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import write_text
from evopress.artifacts.manifest import damaged, damaged_files, file_facts, load_manifest, manifest_text
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import Provenance, require_same_model


def file_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """sha256 and bytes of every file below ``folder``, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}


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


def read_folder_manifest(path: Path) -> dict[str, Any]:
    """Manifest of a model's folder.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    content = load_manifest(path, "stitch")
    try:
        Provenance(**content["provenance"])
        if not all("bytes" in facts for facts in content["files"].values()):
            raise KeyError("bytes")
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, repr(error)) from error
    return content


def read_stitched_manifest(run: Run, search: str) -> dict[str, Any]:
    """Manifest of a stitched model, after checking that it belongs to the model in the run's folder.

    Sizes of all files are checked, and digests of the small ones; `evopress verify` hashes the weights, too.

    Raises:
        ArtifactError: missing, or made for another model.
        DamagedError: the manifest is damaged, or a file is missing, cut short or changed.
    """
    path = run.stitched_manifest(search)
    content = read_folder_manifest(path)
    require_same_model(run, Provenance(**content["provenance"]), path)
    for error in damaged_files(run.stitched(search), content["files"], path):
        raise error  # without its manifest the folder is written anew
    return content


def model_folder(run: Run, search: str) -> Path:
    """Hugging Face folder of a search's model or of the dense one, after checking the former against its manifest.

    Raises:
        ArtifactError: the stitched model is missing, or of another model.
        DamagedError: a file is missing, cut short or changed.
    """
    if search == DENSE:
        return run.model
    read_stitched_manifest(run, search)
    return run.stitched(search)
