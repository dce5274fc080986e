"""What the report says of the studies of a run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import PEERS, SECTIONS, TRACE, read_provenance, read_table, settings_of, write_table
from evopress.config.context import StageContext
from evopress.report.comparison import Comparison
from evopress.report.search_section import FITNESS
from evopress.report.sections import environment
from studies.comparison import as_comparison
from studies.convergence import convergence_rows
from studies.monotonicity import measured, monotonicity_findings, monotonicity_rows, value
from studies.paths import (
    candidates_path,
    comparison_path,
    convergence_path,
    pairs_path,
    peers_path,
    sections_path,
)
from studies.peers import peers_findings, peers_rows
from studies.plots import comparison_figure, convergence_figure, errors_figure, peers_figure, progress_figure
from studies.settings import ReportedStudies
from studies.tables import COMPARISON, CONVERGENCE, MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS, Rows

TEMPLATE = Path(__file__).with_suffix(".html.j2")
WITHIN_BUDGET = ("evolution", "random")
"""Strategies whose accepted candidates all meet the budget, so that their fitness tells how far they have come."""
_COMPARED = (
    "Searches that only differ in their seed are one row here: the mean, ± the standard deviation over the seeds. A "
    "compressed model that is better than all others is marked, where the difference exceeds the standard deviations "
    "of both together. Tokens are those that all candidates together were judged on."
)
_SPREAD = "Mean over the seeds, with the standard deviation as a bar; held-out text."
_PROGRESS = (
    "Best fitness so far by tokens judged, one line a search. Where the last selection step sees less than the whole "
    "search text, a lucky draw of tokens shows as progress."
)
_CONVERGED = (
    "The engine on linear objectives over bit strings of length n with k ones: generations to the optimum against "
    "k(n - k)/lambda, the order that theory gives for one switch an offspring. The slope is fitted to the means over "
    "seeds, through the origin."
)
_MONOTONE = (
    "Pairs of candidates of which the one that should be better is worse. They were looked for among random candidates "
    "on some text, and the clearest of them judged again on other text; worse by so much, ± the standard error of the "
    "difference over its sequences, in the logarithm of perplexity or in KL."
)
_PEERS = (
    "Files that llama.cpp's own quantizer makes of the same model with importances from the same calibration text, "
    "read back and measured as the models of searches are; those that are smaller than the file that the model came "
    "in. Ours is a search with the size of each for its target."
)
_SIZES = "Each point is one GGUF file."
_SCATTER = "Random candidates of equal budget. Orange lines join the confirmed pairs whose summed errors mislead."


@dataclass(frozen=True)
class Shown:
    """A figure and what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class StudySection:
    """One study: a table of measured cells or of texts, and figures."""

    title: str
    text: str
    comparison: Comparison | None = None
    rows: Rows = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)


def write_sections(context: StageContext, settings: ReportedStudies) -> None:
    """Write what the report shows of the studies: their tables as HTML, with figures.

    Raises:
        ArtifactError: a table is missing, damaged or of another model, or the sections cannot be written.
    """
    run, studies = context.run, settings
    page = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = [(study.title, page.render(study=study)) for study in _sections(run, studies)]
    provenance = Provenance("study_report", studies.model_dump_json(), read_model_fingerprint(run))
    write_table(pd.DataFrame(rows, columns=SECTIONS.names), sections_path(run), SECTIONS, provenance)


def _sections(run: Run, studies: ReportedStudies) -> Iterator[StudySection]:
    if studies.groups:
        yield _comparison(run, studies)
    for name in studies.monotonicity:
        yield _monotonicity(run, name)
    if studies.peers:
        peers = _table(run, peers_path(run), PEERS)
        figures = [_shown(peers_figure(peers), _SIZES)] if len(peers) else []
        text = f"{_PEERS} {peers_findings(peers)}"
        yield StudySection("llama.cpp's quantizer", text, rows=peers_rows(peers), figures=figures)
    if studies.convergence:
        table = read_table(convergence_path(run), CONVERGENCE)
        figure = _shown(convergence_figure(table), "Every run, on logarithmic axes.")
        yield StudySection("Convergence", _CONVERGED, rows=convergence_rows(table), figures=[figure])


def _comparison(run: Run, studies: ReportedStudies) -> StudySection:
    table = _table(run, comparison_path(run), COMPARISON)
    figures = [_shown(comparison_figure(table), _SPREAD)]
    traces: dict[str, list[pd.DataFrame]] = {}
    fitness: dict[str, str] = {}
    for group, searches in studies.groups.items():
        settings = settings_of(run.configuration(searches[0]))
        found = [read_table(run.trace(search), TRACE) for search in searches]
        if settings["strategy"] in WITHIN_BUDGET and all(trace["accepted"].any() for trace in found):
            traces[group], fitness[group] = found, FITNESS[settings["fitness"]]
    if traces:
        figures.append(_shown(progress_figure(traces, fitness), _PROGRESS))
    return StudySection("Comparison over seeds", _COMPARED, comparison=as_comparison(table), figures=figures)


def _monotonicity(run: Run, name: str) -> StudySection:
    candidates = _table(run, candidates_path(run, name), MONOTONICITY_CANDIDATES)
    pairs = _table(run, pairs_path(run, name), MONOTONICITY_PAIRS)
    fitness = settings_of(pairs_path(run, name))["fitness"]
    shown = candidates.assign(fitness=[value(mean, fitness) for mean in candidates["fitness"]])
    figure = errors_figure(shown, pairs, name, measured(fitness))
    text = f"{_MONOTONE} {monotonicity_findings(candidates, pairs)}"
    rows = monotonicity_rows(pairs, fitness)
    return StudySection(f"Monotonicity: {name}", text, rows=rows, figures=[_shown(figure, _SCATTER)])


def _table(run: Run, path: Path, schema: Any) -> pd.DataFrame:
    table = read_table(path, schema)
    require_same_model(run, read_provenance(path), path)
    return table


def _shown(svg: str, caption: str) -> Shown:
    return Shown(Markup(svg), caption)  # noqa: S704 (matplotlib escapes)
