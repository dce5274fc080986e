"""What made an artifact: written into each one, and checked when several are read together."""

import json
from dataclasses import asdict, dataclass

from evopress import __version__
from evopress.artifacts.damage import damaged
from evopress.artifacts.manifest import load_manifest
from evopress.artifacts.paths import Run

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
