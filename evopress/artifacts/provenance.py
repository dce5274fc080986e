"""What made an artifact: written into each one, and checked when several are read together."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evopress import __version__
from evopress.artifacts.manifest import damaged, load_manifest
from evopress.artifacts.paths import Run
from evopress.util.errors import ArtifactError

# Versions of what made a result.

PACKAGES = ("evopress", "torch", "transformers", "safetensors", "datasets", "lm-eval", "numpy", "pandas", "snakemake")


def versions() -> dict[str, str]:
    """Version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


PROVENANCE_KEY = "evopress"
"""Key under which the metadata of a parquet or safetensors file holds it."""


@dataclass(frozen=True)
class Provenance:
    """Stage, its slice of the settings, and the fingerprint of the dense model it belongs to."""

    stage: str
    settings: str
    """Normalised JSON of the stage's slice of the settings."""
    model: str
    """Fingerprint of the dense model (``model.json``)."""
    version: str = __version__
    key: str = ""
    """Digest of all that it depends on (`evopress.workflow.keys`), where the stage was told."""

    def dumps(self) -> str:
        """Serialise as JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> "Provenance":
        """Read what ``dumps`` wrote."""
        return cls(**json.loads(text))


def read_model_fingerprint(run: Run) -> str:
    """Fingerprint of the dense model, without loading anything of the model.

    Raises:
        ArtifactError: ``model.json`` is missing.
        DamagedError: it is damaged, or holds no fingerprint.
    """
    path = run.model_manifest
    fingerprint = load_manifest(path, "model").get("fingerprint")
    if not isinstance(fingerprint, str) or not fingerprint:
        raise damaged(path, "holds no fingerprint")
    return fingerprint


def require_same_model(run: Run, provenance: Provenance, path: Path) -> None:
    """Check that the artifact at ``path`` was made for the model that lies in ``results``.

    Raises:
        ArtifactError: it was made for another model, or the model's manifest cannot be read.
    """
    expected = read_model_fingerprint(run)
    if provenance.model != expected:
        raise ArtifactError(
            f"{path}: was made for another model (fingerprint {provenance.model[:12]}) than the one in "
            f"{run.model} ({expected[:12]}); delete it and run again"
        )
