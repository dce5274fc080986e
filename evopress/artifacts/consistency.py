"""Checks that artifacts that are read together belong to the same model."""

from pathlib import Path

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.util.errors import ArtifactError


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
