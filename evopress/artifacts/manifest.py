"""Manifests: small JSON files that say what an artifact is, with a checksum of what they say."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evopress.artifacts.damage import damaged
from evopress.util.errors import ArtifactError

_CHECKSUM = "checksum"


def manifest_text(content: Mapping[str, Any]) -> str:
    """Text of a manifest, with its checksum."""
    return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1, sort_keys=True) + "\n"


def load_manifest(path: Path, stage: str = "") -> dict[str, Any]:
    """Read a manifest and check that it says what was written; ``stage`` is who writes it, if its path does not tell.

    Raises:
        ArtifactError: missing.
        DamagedError: cut short or changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop(_CHECKSUM, None)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run the stage that writes it{stage and f' ({stage})'}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise damaged(path, repr(error)) from error
    if checksum is not None and checksum != _checksum(content):  # a hit in the key itself leaves the rest as it was
        raise damaged(path, "differs from its checksum")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
