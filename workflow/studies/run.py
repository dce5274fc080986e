"""The studies of a run: its settings with theirs checked, and the slice that each study's result depends on."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict

from evopress.artifacts.paths import Run
from evopress.workflow.families import level_problems
from evopress.workflow.seeds import groups
from evopress.workflow.settings import Settings
from studies.paths import convergence_path, pairs_path
from studies.settings import MonotonicitySettings, ReportedStudies, StudiesSettings, require_text


class StudiedSettings(Settings):
    """Everything that a run is asked to do."""

    model_config = ConfigDict(title="Settings")

    studies: StudiesSettings = StudiesSettings()

    def problems(self) -> Iterator[str]:
        """What does not hold between sections, those of the studies included."""
        yield from super().problems()
        for name, study in self.studies.monotonicity.items():
            yield from _study_problems(f"studies.monotonicity.{name}", study, self)


def _study_problems(where: str, study: MonotonicitySettings, settings: Settings) -> Iterator[str]:
    yield from level_problems(where, study, settings.variants)
    text = settings.data.search
    if text.tokens is None:
        return
    try:
        require_text(study, text.tokens // text.sequence_length, text.sequence_length)
    except ValueError as error:
        yield f"{where}.{error}"


def comparison_slice(settings: StudiedSettings) -> str:
    """Searches by the name in the settings."""
    return ReportedStudies(groups=_groups(settings)).model_dump_json(include={"groups"})


def convergence_slice(settings: StudiedSettings) -> str:
    """The study of convergence, which must be in the settings."""
    assert settings.studies.convergence is not None
    return settings.studies.convergence.model_dump_json()


def monotonicity_slice(settings: StudiedSettings, study: str) -> str:
    """One study of monotonicity."""
    return settings.studies.monotonicity[study].model_dump_json()


def reported_studies(settings: StudiedSettings) -> ReportedStudies:
    """What the report says of studies."""
    found = _groups(settings)
    return ReportedStudies(
        groups=found if list(found) != list(settings.searches) else {},
        convergence=settings.studies.convergence is not None,
        monotonicity=tuple(settings.studies.monotonicity),
    )


def _groups(settings: Settings) -> dict[str, tuple[str, ...]]:
    return {name: tuple(members) for name, members in groups(settings.searches).items()}


def studied_slices(settings: StudiedSettings, run: Run) -> Iterator[tuple[Path, str]]:
    """One artifact of each study, with the slice that should have made it."""
    if settings.studies.convergence is not None:
        yield convergence_path(run), convergence_slice(settings)
    for study in settings.studies.monotonicity:
        yield pairs_path(run, study), monotonicity_slice(settings, study)
