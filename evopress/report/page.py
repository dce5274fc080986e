"""The report: one HTML file that works offline, and the summary for the terminal.

It ends with what it takes to make the same run again: settings, seeds, versions, and digests to compare with.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evopress.artifacts.atomic import write_text
from evopress.artifacts.exports import load_export_manifest
from evopress.artifacts.manifest import sha256
from evopress.artifacts.model_facts import read_model_facts
from evopress.artifacts.paths import DENSE, Run
from evopress.artifacts.provenance import read_model_fingerprint, versions
from evopress.artifacts.tables import PERPLEXITY, RUNTIME, read_table, settings_of
from evopress.config.base import to_yaml
from evopress.config.context import StageContext
from evopress.data.held_out import recorded_leaks
from evopress.plan.stages import Stage
from evopress.plan.text import planned
from evopress.report.comparison import compare, compare_in_runtime, summary
from evopress.report.costs import cost_rows
from evopress.report.front import front_sections, front_text, read_fronts
from evopress.report.maps import configurations_of, effect_maps, error_maps, level_maps
from evopress.report.search_section import search_section
from evopress.report.sections import environment, read_sections
from evopress.search.configuration import Configuration
from evopress.util.errors import EvopressError
from evopress.util.progress import log
from evopress.workflow.settings import Settings

TEMPLATE = Path(__file__).with_suffix(".html.j2")
STYLE, SCRIPT = (Path(__file__).with_suffix(suffix) for suffix in (".css", ".js"))
DIGESTS = ["what", "seed", "sha256"]


def write_report(
    context: StageContext,
    searches: Sequence[str],
    exports: Sequence[Path] = (),
    on_tasks: Sequence[str] = (),
    in_runtime: Sequence[str] = (),
    sections: Sequence[Path] = (),
    fronts: Sequence[str] = (),
    peers: Path | None = None,
    config: str = "{}",
) -> None:
    """Write report.html and summary.txt.

    Args:
        context: of the stage.
        searches: names of the searches to compare.
        exports: folders of their models, to be named.
        on_tasks: models that have answered lm-eval's tasks; none where no task is named.
        in_runtime: models whose files have been measured in the runtime.
        sections: tables of sections to include, with the columns of SECTIONS.
        fronts: names of searches that stand for several sizes each.
        peers: table of llama.cpp's own files, to be drawn beside them (columns of PEERS).
        config: all settings of the run as JSON, as they were written, for the plan and for whoever makes it again.

    Raises:
        ArtifactError: an artifact is missing, damaged, of another model, or the report cannot be written.
    """
    results, settings = context.run, json.loads(config)
    facts = read_model_facts(results)
    comparison, runtime = compare(results, searches, exports, on_tasks), compare_in_runtime(results, in_runtime)
    curves = read_fronts(results, fronts, searches, comparison, peers)
    seen = recorded_leaks(results, read_table(results.perplexity(DENSE), PERPLEXITY)["dataset"])
    configurations = configurations_of(results, searches)
    html = _rendered(
        run=results.root.name,
        facts=facts,
        comparison=comparison,
        runtime=runtime,
        measured=read_table(results.runtime(in_runtime[0]), RUNTIME).iloc[0] if in_runtime else None,
        leaks=seen,
        extra=[*front_sections(curves), *read_sections(results, sections)],
        sections=[search_section(results, search, _written(exports, search)) for search in searches],
        level_maps=level_maps(configurations),
        number_maps=[*effect_maps(results, configurations), *error_maps(results, configurations)],
        costs=cost_rows(results, searches, _planned(results, settings)),
        commands=commands(results),
        whole_settings=whole_settings(settings),
        settings=to_yaml(recorded_settings(results, searches)),
        digests=digests(results, searches, exports),
    )
    write_text(results.report, html)
    title = f"{facts.name}, compressed ({results.root})\nfrom {facts.origin}"
    write_text(results.summary, summary(comparison, results, title, exports, seen, runtime, map(front_text, curves)))


def _rendered(**values: Any) -> str:
    """The page: the template with ``values`` in it, and with its style and its script."""
    style = Markup(STYLE.read_text(encoding="utf-8"))  # noqa: S704 (a file of ours)
    template = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(dense=DENSE, versions=versions(), style=style, **_script(), **values)


def _script() -> dict[str, str]:
    """The one script of the page, and the digest by which the page allows it."""
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "digest": digest}  # noqa: S704 (a file of ours)


def _written(exports: Sequence[Path], search: str) -> list[str]:
    """Names of the exporters that have written the model of a search."""
    return [folder.name for folder in exports if folder.parent.name == search]


def _planned(run: Run, settings: Mapping[str, Any]) -> list[Stage]:
    """Stages of the plan; none where the settings are not known, or cannot be planned any more."""
    try:
        return planned(Settings.load(settings), run).stages if settings else []
    except EvopressError as error:  # a run that has ended is reported, whatever became of its files
        log.warning("no plan to compare with: %s", error)
        return []


def recorded_settings(run: Run, searches: Sequence[str]) -> dict[str, Any]:
    """Settings as the artifacts themselves record them: of the texts, the variants and the searches.

    Raises:
        ArtifactError: a table has no readable provenance.
    """
    made: dict[str, Any] = {"texts": {}, "variants": {}, "searches": {}}
    for dataset in _texts(run):
        made["texts"][dataset] = settings_of(run.tokens(dataset))
    for search in searches:
        made["searches"][search] = settings_of(run.configuration(search))
        for name, table in Configuration.read(run, search).made_by(run):
            made["variants"][name] = settings_of(table)
    return made


def digests(run: Run, searches: Sequence[str], exports: Sequence[Path]) -> list[list[str]]:
    """Seeds and digests as a table of texts, DIGESTS first: of the model, texts, configurations and weights."""
    return [DIGESTS, ["model", "-", read_model_fingerprint(run)], *_digests(run, searches, exports)]


def whole_settings(config: Mapping[str, Any]) -> str:
    """A file that stands alone: the settings of the run, the default included, as YAML; empty if not known."""
    return to_yaml({"complete": True, **config}) if config else ""


def commands(run: Run) -> list[str]:
    """What makes the run again, with its settings in `settings.yaml`, and what checks its files."""
    return ["snakemake --cores all --configfile settings.yaml", f"evopress verify {run.root}"]


def _digests(run: Run, searches: Sequence[str], exports: Sequence[Path]) -> Iterator[list[str]]:
    for dataset in _texts(run):
        yield [f"text {dataset}", _seed(settings_of(run.tokens(dataset))), sha256(run.tokens(dataset))]
    for search in searches:
        path = run.configuration(search)
        yield [f"levels of {search}", _seed(settings_of(path)), sha256(path)]
    for folder in exports:
        manifest = run.export_manifest(folder.parent.name, folder.name)
        files = load_export_manifest(manifest)["files"] if manifest.exists() else {}
        for name, facts in files.items():
            if name.endswith((".gguf", ".safetensors")):
                yield [f"{folder.parent.name}/{folder.name}/{name}", "-", str(facts["sha256"])]


def _texts(run: Run) -> Iterator[str]:
    """Names of the texts that are there; without searches, none is searched on."""
    held_out = read_table(run.perplexity(DENSE), PERPLEXITY)["dataset"]
    return (dataset for dataset in ("calibration", "search", *held_out) if run.tokens(dataset).exists())


def _seed(settings: Mapping[str, Any]) -> str:
    return str(settings.get("seed", "-"))
