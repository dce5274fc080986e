"""Refuses artifacts that other settings made and that Snakemake, having no record of them, would take as they are."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evopress.util.errors import ArtifactError


def require_settings(expected: Iterable[tuple[Path, str]], root: Path) -> None:
    """Check that artifacts of unknown history were made by the slices of the settings that are asked for now.

    Args:
        expected: path of each artifact and the slice (JSON) it should have been made by; paths may not exist.
        root: folder of the run, named in the advice.

    Raises:
        ArtifactError: an artifact was made by other settings, or does not say by which.
    """
    for path, settings in expected:
        if path.exists() and (differences := _differences(_recorded(path), json.loads(settings))):
            raise ArtifactError(
                f"{path}: was made by other settings ({', '.join(differences)}), and Snakemake has no record of it "
                f"here. Choose another `name`, restore those settings, or remove the folder ({root})"
            )


def _recorded(path: Path) -> dict[str, Any]:
    """Settings in the provenance of a table or a manifest."""
    try:
        if path.suffix == ".json":
            return json.loads(json.loads(path.read_text(encoding="utf-8"))["provenance"]["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: no readable provenance ({error!r}); delete it and run again") from error
    from evopress.artifacts.tables import read_provenance  # pandas: seldom needed, and slow to import for every job

    return json.loads(read_provenance(path).settings)


def _differences(recorded: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Settings that differ; those that one side does not know (another version of evopress) are passed over."""
    return [
        f"{key}: {json.dumps(recorded[key])}, now {json.dumps(value)}"
        for key, value in asked.items()
        if key in recorded and recorded[key] != value
    ]
