"""What made an artifact: written into each one, and checked when several are read together."""

import json
from dataclasses import asdict, dataclass

from evopress import __version__


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
