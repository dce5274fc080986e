"""Manifest of a stitched model: digest and size of each file, written once the folder is whole."""

import json
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import write_text
from evopress.artifacts.consistency import require_same_model
from evopress.artifacts.paths import DENSE, Results
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tensors import sha256
from evopress.errors import ArtifactError


def file_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """sha256 and bytes of every file below ``folder``, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }


def write_stitched_manifest(
    results: Results, search: str, files: dict[str, dict[str, str | int]], provenance: Provenance
) -> None:
    """Write the manifest of a stitched model whose files are ``files``.

    Raises:
        ArtifactError: it cannot be written.
    """
    content = {"files": files, "provenance": json.loads(provenance.dumps()), "search": search}
    write_text(results.stitched_manifest(search), json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_stitched_manifest(results: Results, search: str) -> dict[str, Any]:
    """Manifest of a stitched model, after checking that it belongs to the model in ``results``.

    Sizes of the files are checked; digests are not, since reading all weights for it would take minutes.

    Raises:
        ArtifactError: missing, damaged, made for another model, or a file is missing or cut short.
    """
    path = results.stitched_manifest(search)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        provenance = Provenance(**content["provenance"])
        sizes = {name: facts["bytes"] for name, facts in content["files"].items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that writes it (stitch)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); delete it and run again to remake it") from error
    require_same_model(results, provenance, path)
    for name, size in sizes.items():
        file = results.stitched(search) / name
        if not file.exists() or file.stat().st_size != size:
            raise ArtifactError(f"{file}: missing or cut short; delete {results.stitched(search)} and run again")
    return content


def model_folder(results: Results, search: str) -> Path:
    """Hugging Face folder of a search's model or of the dense one, after checking that it is whole.

    Raises:
        ArtifactError: the stitched model is missing, cut short or of another model.
    """
    if search == DENSE:
        return results.model
    read_stitched_manifest(results, search)
    return results.stitched(search)
