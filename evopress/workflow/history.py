"""Which artifacts Snakemake has a record of here, and a refusal of others that other settings made.

Snakemake compares the parameters of a job with those of the last time, as far as it knows of one. Of results that were
copied from elsewhere it knows nothing and would take them as they are. So a list of the artifacts of each run is kept
beside its records, and what exists but is not on the list must say, in its provenance, that the settings asked for now
have made it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evopress.artifacts.atomic import write_text
from evopress.artifacts.origin import require_settings

_FOLDER = Path(".snakemake/evopress")
"""Lies where Snakemake's records lie, so that it is copied and removed with them."""


@dataclass(frozen=True)
class History:
    """Artifacts of one run that this checkout is responsible for."""

    root: Path
    """Folder of the run."""

    @property
    def file(self) -> Path:
        """The list."""
        return _FOLDER / f"{self.root.name}.json"

    def known(self) -> set[str]:
        """Paths on the list; none where there is no list that can be read."""
        try:
            return set(json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return set()

    def require(self, expected: Iterable[tuple[Path, str]]) -> None:
        """Check artifacts that are not on the list.

        Args:
            expected: path of each artifact, and the slice of the settings (JSON) that it should be made by.

        Raises:
            ArtifactError: one was made by other settings, or does not say by which.
        """
        known = self.known()
        require_settings(((path, slice_) for path, slice_ in expected if str(path) not in known), self.root)

    def remember(self, paths: Iterable[Path]) -> None:
        """Put artifacts on the list, which have been checked or are yet to be made."""
        known = self.known()
        new = known | set(map(str, paths))
        if new != known:
            write_text(self.file, json.dumps(sorted(new), indent=0) + "\n")
