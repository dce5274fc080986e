"""Which artifacts Snakemake has a record of here, and a refusal of others that other settings made.

Snakemake compares the parameters of a job with those of the last time, as far as it knows of one. Of results that were
copied from elsewhere it knows nothing and would take them as they are. So a list of the artifacts of each run is kept
beside its records, and what exists but is not on the list must say, in its provenance, that the settings asked for now
have made it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, manifest_path
from evopress.util.errors import ArtifactError
from evopress.util.job_logs import NAMES
from evopress.workflow.keys import Keys
from evopress.workflow.settings import Settings
from evopress.workflow.slices import log_names

# Refuses artifacts that other settings made and that Snakemake, having no record of them, would take as they are.


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


# Whether variants are up to date, told from what they say of themselves.


def finished_variants(
    run: Run, variants: str, blocks: Sequence[str], keys: Keys, read: Mapping[Path, Sequence[str]]
) -> bool:
    """Whether variants of all ``blocks`` are there, made with the key that they would be made with now.

    Args:
        run: the folder.
        variants: their name.
        blocks: of the model.
        keys: of what is asked for now.
        read: the user's own files that they rest on, by the artifact that was made of them. If one is newer, they may
            be out of date, however little was changed.
    """
    key = keys.variants(variants)
    tables = [run.variant_table(variants, block) for block in blocks]
    manifests = [manifest_path(run.variant_tensors(variants, block)) for block in blocks]
    tensors = [run.variant_tensors(variants, block) for block in blocks]
    if not all(path.exists() for path in [*tables, *manifests, *tensors, *read]):
        return False
    if any(_key_of(manifest) != key for manifest in manifests):
        return False
    return all(
        Path(source).stat().st_mtime <= made.stat().st_mtime for made, sources in read.items() for source in sources
    )


def _key_of(manifest: Path) -> str | None:
    """Key in the provenance of an artifact; None where it cannot be read."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["provenance"].get("key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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


def begin(history: History, expected: Iterable[tuple[Path, str]], settings: Settings) -> None:
    """Note what a run that starts is responsible for, and, beside its logs, which of them are of its settings.

    Args:
        history: of the run.
        expected: path of each of its artifacts, and the slice of the settings that it is made by.
        settings: of the run.
    """
    history.remember(path for path, _ in expected)
    write_text(history.root / "logs" / NAMES, json.dumps(log_names(settings), indent=0) + "\n")
