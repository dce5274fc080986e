"""The report: one HTML file that works offline, and the summary for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from evopress.artifacts.atomic import write_text
from evopress.artifacts.exports import recorded_polish
from evopress.artifacts.model_facts import read_model_facts
from evopress.artifacts.paths import DENSE, HUGGINGFACE, Run
from evopress.artifacts.tables import EFFORT, PERPLEXITY, RUNTIME, TRACE, read_table, settings_of
from evopress.compression.base import Family
from evopress.compression.families import family_of, of_modules
from evopress.config.context import StageContext
from evopress.data.held_out import recorded_leaks
from evopress.report.comparison import compare, compare_in_runtime
from evopress.report.plots import FITNESS, level_map, outer_levels, search_curve
from evopress.report.sections import environment, read_sections
from evopress.report.summary import summary
from evopress.search.configuration import Configuration
from evopress.search.evaluation import read_effort
from evopress.search.target import target_text
from evopress.util.versions import versions
from evopress.util.yaml_text import to_yaml

TEMPLATE = Path(__file__).with_suffix(".html.j2")


@dataclass(frozen=True)
class SearchSection:
    """What the report says of one search."""

    name: str
    strategy: str
    caption: str
    """Of the level map."""
    budget: str
    """What was asked for, and what was reached."""
    generations: int
    curve: Markup | None
    level_map: Markup | None
    level: str
    """The one level of a configuration that has no other."""
    polish: str
    """How the chosen levels were made once more; empty where they were not."""
    exports: str
    """Forms in which its model is written."""


def write_report(
    context: StageContext,
    searches: Sequence[str],
    exports: Sequence[Path] = (),
    in_runtime: Sequence[str] = (),
    sections: Sequence[Path] = (),
) -> None:
    """Write report.html and summary.txt.

    Args:
        context: of the stage.
        searches: names of the searches to compare.
        exports: folders of their models, to be named.
        in_runtime: models whose files have been measured in the runtime.
        sections: tables of sections to include, with the columns of SECTIONS.

    Raises:
        ArtifactError: an artifact is missing, damaged, of another model, or the report cannot be written.
    """
    results = context.run
    facts = read_model_facts(results)
    comparison, runtime = compare(results, searches, exports), compare_in_runtime(results, in_runtime)
    seen = recorded_leaks(results, read_table(results.perplexity(DENSE), PERPLEXITY)["dataset"])
    configurations = {search: Configuration.read(results, search).table for search in searches}
    values: dict[str, set[float]] = {}
    for configuration in configurations.values():
        values.setdefault(family_of(configuration).name, set()).update(configuration["value"])
    written = {search: [folder.name for folder in exports if folder.parent.name == search] for search in searches}
    compared = [_section(results, search, configurations[search], values, written[search]) for search in searches]
    page = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = page.render(
        run=results.root.name,
        facts=facts,
        dense=DENSE,
        comparison=comparison,
        runtime=runtime,
        measured=read_table(results.runtime(in_runtime[0]), RUNTIME).iloc[0] if in_runtime else None,
        leaks=seen,
        extra=read_sections(results, sections),
        sections=compared,
        settings=to_yaml(recorded_settings(results, searches)),
        versions=versions(),
    )
    write_text(results.report, html)
    title = f"{facts.name}, compressed ({results.root})\nfrom {facts.origin}"
    write_text(results.summary, summary(comparison, results, title, exports, seen, runtime))


def recorded_settings(results: Run, searches: Sequence[str]) -> dict[str, Any]:
    """Settings as the artifacts themselves record them: of the texts, the variants and the searches.

    Raises:
        ArtifactError: a table has no readable provenance.
    """
    made: dict[str, Any] = {"texts": {}, "variants": {}, "searches": {}}
    held_out = read_table(results.perplexity(DENSE), PERPLEXITY)["dataset"]
    for dataset in ("calibration", "search", *held_out):
        if results.tokens(dataset).exists():  # without searches, there is none to search on
            made["texts"][dataset] = settings_of(results.tokens(dataset))
    for search in searches:
        made["searches"][search] = settings_of(results.configuration(search))
        for name, table in Configuration.read(results, search).made_by(results):
            made["variants"][name] = settings_of(table)
    return made


def _section(
    results: Run,
    search: str,
    configuration: pd.DataFrame,
    values: Mapping[str, set[float]],
    exporters: Sequence[str],
) -> SearchSection:
    settings = settings_of(results.configuration(search))
    trace = read_table(results.trace(search), TRACE)
    levels = sorted(set(configuration["level"]))
    curve = None
    if trace["accepted"].any():
        fitness = str(settings.get("fitness", "fitness"))
        curve = Markup(search_curve(trace, search, FITNESS.get(fitness, fitness)))  # noqa: S704 (matplotlib escapes)
    several = len(levels) > 1
    family = family_of(configuration)
    return SearchSection(
        name=search,
        strategy=str(settings.get("strategy", "unknown")),
        caption=family.level_map + outer_levels(configuration),
        budget=_budget(settings.get("target"), configuration, family),
        generations=int(trace["generation"].max()) if len(trace) else 0,
        curve=curve,
        level_map=Markup(level_map(configuration, search, sorted(values[family.name]))) if several else None,  # noqa: S704
        level="" if several else levels[0],
        polish=_polish(results, search),
        exports=", ".join(exporters),
    )


def _polish(results: Run, search: str) -> str:
    """How the model that is evaluated was polished, and how long that took."""
    polish = recorded_polish(results, search, HUGGINGFACE)
    if polish == "none":
        return ""
    effort = read_effort(read_table(results.polish_effort(search), EFFORT))
    return f"polished ({polish}, {effort.seconds:.0f} s)"


def _budget(target: object, configuration: pd.DataFrame, family: Family) -> str:
    asked = target_text(target)
    rows = configuration[of_modules(configuration) == family.takes_modules]
    if isinstance(target, Mapping):
        return f"a file of {asked} {family.reached(rows)} in {family.asked}"
    return f"{asked} {family.asked} {family.reached(rows)}"
