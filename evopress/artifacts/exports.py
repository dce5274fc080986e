"""Manifest of an export: digest and size of each file of its folder, written once the folder is whole."""

import json
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import write_text
from evopress.artifacts.manifest import damaged, damaged_files, file_facts, load_manifest, manifest_text
from evopress.artifacts.paths import DENSE, HUGGINGFACE, Run
from evopress.artifacts.provenance import Provenance, require_same_model


def file_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """sha256 and bytes of every file below ``folder``, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}


def write_export_manifest(
    run: Run, search: str, exporter: str, files: dict[str, dict[str, str | int]], provenance: Provenance
) -> None:
    """Write the manifest of an export whose files are ``files``.

    Raises:
        ArtifactError: it cannot be written.
    """
    content = {"files": files, "provenance": json.loads(provenance.dumps()), "search": search}
    write_text(run.export_manifest(search, exporter), manifest_text(content))


def load_export_manifest(path: Path) -> dict[str, Any]:
    """Manifest of an export, as it was written.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    content = load_manifest(path, "export")
    try:
        Provenance(**content["provenance"])
        if not all("bytes" in facts for facts in content["files"].values()):
            raise KeyError("bytes")
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, repr(error)) from error
    return content


def read_export_manifest(run: Run, search: str, exporter: str) -> dict[str, Any]:
    """Manifest of an export, after checking that it belongs to the model in the run's folder.

    Sizes of all files are checked, and digests of the small ones; `evopress verify` hashes the weights, too.

    Raises:
        ArtifactError: missing, or made for another model.
        DamagedError: the manifest is damaged, or a file is missing, cut short or changed.
    """
    path = run.export_manifest(search, exporter)
    content = load_export_manifest(path)
    require_same_model(run, Provenance(**content["provenance"]), path)
    for error in damaged_files(run.export(search, exporter), content["files"], path):
        raise error  # without its manifest the folder is written anew
    return content


def weights_bytes(run: Run, search: str, exporter: str, suffix: str) -> int:
    """Bytes of the files of an export whose names end in ``suffix``, as its manifest has them.

    Raises:
        ArtifactError: as `read_export_manifest`.
    """
    files = read_export_manifest(run, search, exporter)["files"]
    return sum(int(facts["bytes"]) for name, facts in files.items() if name.endswith(suffix))


def recorded_polish(run: Run, search: str, exporter: str) -> str:
    """How the levels of an export were polished, as its manifest records it; `none` where they, or it, were not made.

    Raises:
        DamagedError: the manifest is cut short or changed.
    """
    if not run.export_manifest(search, exporter).exists():
        return "none"
    provenance = load_export_manifest(run.export_manifest(search, exporter))["provenance"]
    return str(json.loads(provenance["settings"]).get("polish", "none"))


def model_folder(run: Run, search: str) -> Path:
    """Hugging Face folder of a search's model or of the dense one, after checking the former against its manifest.

    Raises:
        ArtifactError: the exported model is missing, or of another model.
        DamagedError: a file is missing, cut short or changed.
    """
    if search == DENSE:
        return run.model
    read_export_manifest(run, search, HUGGINGFACE)
    return run.export(search, HUGGINGFACE)
