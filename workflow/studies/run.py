"""The studies of a run: its settings with theirs checked, and the slice that each study's result depends on."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict

from evopress.artifacts.paths import DENSE, HUGGINGFACE, Run
from evopress.util.errors import ConfigError
from evopress.workflow.keys import Keys
from evopress.workflow.searches import groups, variants_problems
from evopress.workflow.settings import Settings
from evopress.workflow.stages import Stage
from studies.paths import convergence_path, pairs_path, peer_path, peers_path, rival_name
from studies.settings import (
    MonotonicitySettings,
    PeersSettings,
    ReportedStudies,
    StudiesSettings,
    find_program,
    require_text,
)

STAGES = {
    "comparison": Stage("studies.comparison", "compare_searches"),
    "convergence": Stage("studies.convergence", "measure_convergence"),
    "monotonicity": Stage("studies.monotonicity", "measure_monotonicity", gpu=True),
    "peer_sources": Stage("studies.peers", "write_sources"),
    "peer_file": Stage("studies.peers", "quantize_peer"),
    "peer": Stage("studies.peers", "measure_peer", gpu=True),
    "peer_search": Stage("studies.rivals", "search_rival", gpu=True),
    "peers": Stage("studies.peers", "compare_peers"),
    "report": Stage("studies.report", "write_sections"),
}
"""As `evopress.workflow.stages.STAGES`."""


class StudiedSettings(Settings):
    """Everything that a run is asked to do."""

    model_config = ConfigDict(title="Settings")

    studies: StudiesSettings = StudiesSettings()

    def problems(self) -> Iterator[str]:
        """What does not hold between sections, those of the studies included."""
        yield from super().problems()
        for name, study in self.studies.monotonicity.items():
            yield from _study_problems(f"studies.monotonicity.{name}", study, self)
        if self.studies.peers is not None:
            yield from _peers_problems(self.studies.peers, self)


def _study_problems(where: str, study: MonotonicitySettings, settings: Settings) -> Iterator[str]:
    yield from variants_problems(where, study.variants, study.target, settings.variants)
    text = settings.data.search
    if text.tokens is None:
        return
    try:
        require_text(study, text.tokens // text.sequence_length, text.sequence_length)
    except ValueError as error:
        yield f"{where}.{error}"


def _peers_problems(study: PeersSettings, settings: Settings) -> Iterator[str]:
    try:
        find_program(study.quantizer)
    except ConfigError as error:
        yield str(error)
    if study.against is not None and study.against not in settings.searches:
        yield (
            f"studies.peers.against: no search is named {study.against!r}: there are: "
            f"{', '.join(settings.searches) or 'none'}"
        )
    for peer in study.peers():
        if rival_name(peer) in settings.searches:
            yield f"searches.{rival_name(peer)}: the name is taken by studies.peers; choose another"


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


def peer_slice(settings: StudiedSettings, peer: str) -> str:
    """One file of llama.cpp's quantizer."""
    assert settings.studies.peers is not None
    return settings.studies.peers.peers()[peer].model_dump_json()


def peers_slice(settings: StudiedSettings) -> str:
    """All files, and what they are compared with."""
    study = settings.studies.peers
    assert study is not None
    return json.dumps({"peers": list(study.peers()), "against": study.against})


def reported_studies(settings: StudiedSettings) -> ReportedStudies:
    """What the report says of studies."""
    found = _groups(settings)
    return ReportedStudies(
        groups=found if list(found) != list(settings.searches) else {},
        convergence=settings.studies.convergence is not None,
        monotonicity=tuple(settings.studies.monotonicity),
        peers=settings.studies.peers is not None,
    )


def _groups(settings: Settings) -> dict[str, tuple[str, ...]]:
    return {name: tuple(members) for name, members in groups(settings.searches).items()}


def studied_slices(settings: StudiedSettings, run: Run) -> Iterator[tuple[Path, str]]:
    """One artifact of each study, with the slice that should have made it."""
    if settings.studies.convergence is not None:
        yield convergence_path(run), convergence_slice(settings)
    for study in settings.studies.monotonicity:
        yield pairs_path(run, study), monotonicity_slice(settings, study)
    if settings.studies.peers is not None:
        yield peers_path(run), peers_slice(settings)
        for peer in settings.studies.peers.peers():
            yield peer_path(run, peer), peer_slice(settings, peer)


def study_key(keys: Keys, settings: StudiedSettings, stage: str, study: str = "") -> str:
    """Key (`evopress.workflow.keys`) of what a study leaves; ``study`` is the name of one of several."""
    measured = [keys.evaluation("perplexity", search) for search in settings.searches]
    measured += [keys.evaluation("tasks", model) for model in settings.on_tasks()]
    if stage.startswith("peer"):
        return _peers_key(keys, settings, stage, study)
    if stage == "comparison":
        own, before = comparison_slice(settings), measured
    elif stage == "convergence":
        own, before = convergence_slice(settings), []
    elif stage == "monotonicity":
        variants = settings.studies.monotonicity[study].variants
        own, before = monotonicity_slice(settings, study), [keys.tokens("search"), keys.variants(variants)]
    else:
        own = reported_studies(settings).model_dump_json()
        before = [study_key(keys, settings, "comparison")] if reported_studies(settings).groups else []
        if settings.studies.convergence is not None:
            before.append(study_key(keys, settings, "convergence"))
        before += [study_key(keys, settings, "monotonicity", name) for name in settings.studies.monotonicity]
        if settings.studies.peers is not None:
            before.append(study_key(keys, settings, "peers"))
    return keys.of([STAGES[stage].module], own, *before)


def _peers_key(keys: Keys, settings: StudiedSettings, stage: str, peer: str) -> str:
    """The same for the stages of the study of peers."""
    study = settings.studies.peers
    assert study is not None

    def earlier(stage: str, name: str = peer) -> str:
        return _peers_key(keys, settings, stage, name)

    if stage == "peer_sources":
        own, before = "{}", [keys.hessians()]
    elif stage == "peer_file":
        own, before = peer_slice(settings, peer), [earlier("peer_sources")]
    elif stage == "peer":
        own, before = peer_slice(settings, peer), [earlier("peer_file"), keys.evaluation("perplexity", DENSE)]
    elif stage == "peer_search":
        assert study.against is not None
        exports = [keys.export(study.against, exporter) for exporter in ("gguf", HUGGINGFACE)]
        own, before = peer_slice(settings, peer), [earlier("peer"), *exports]
    else:
        kinds = ["peer", *(["peer_search"] if study.against is not None else [])]
        own, before = peers_slice(settings), [earlier(kind, name) for kind in kinds for name in study.peers()]
    return keys.of([STAGES[stage].module], own, *before)
