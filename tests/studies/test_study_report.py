"""Studies in the report: the numbers of their tables, whole figures, names that cannot break out of them."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from finished_run import make_results, provenance, write_configuration, write_tokens
from report_page import Page, measure, trace, write_way

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import EFFORT, VARIANTS, read_table, write_table
from evopress.config.context import StageContext
from evopress.report.page import write_report
from evopress.util.errors import ArtifactError
from studies.comparison import compare_searches
from studies.convergence import measure_convergence
from studies.paths import candidates_path, comparison_path, pairs_path, sections_path, text_path
from studies.plots import comparison_figure, progress_figure
from studies.report import write_sections
from studies.settings import ConvergenceSettings, ReportedStudies
from studies.tables import COMPARISON, MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS

GROUPS = {"uniform": ("uniform",), "evo": ("evo-seed0", "evo-seed1")}
STUDIES = ReportedStudies(groups=GROUPS, convergence=True, monotonicity=("bits",))
SEARCHES = [search for members in GROUPS.values() for search in members]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one search twice, all measured, and its studies."""
    run = make_results(tmp_path)
    write_tokens(run, "novels")
    write_table(pd.DataFrame(columns=VARIANTS.names), run.variant_table("gptq", 0), VARIANTS, provenance())
    measure(run, "dense", 10.0, 0.0, 0.9)
    for number, search in enumerate(SEARCHES):
        write_configuration(run, search, level=None if number else "3")
        write_way(run, search, evolved=number > 0)
        effort = pd.DataFrame([(2000 * number, 1.5)], columns=EFFORT.names)
        write_table(effort, run.effort(search), EFFORT, provenance())
        measure(run, search, 20.0 - 4 * number, 0.5 - 0.1 * number, 0.6)
    context = StageContext(run)
    compare_searches(context, ReportedStudies(groups=GROUPS))
    measure_convergence(context, ConvergenceSettings(units=(4, 6), kept=(0.5,), offspring=(1, 2), runs=2))
    _write_monotonicity(run)
    return run


def _write_monotonicity(run: Run) -> None:
    made = provenance({"fitness": "perplexity"})
    candidates = [(0, -1, 1.0, 5, 3.0, [0]), (1, -1, 2.0, 5, 2.0, [1]), (2, 1, 1.5, 6, 1.9, [2])]
    frame = pd.DataFrame(candidates, columns=MONOTONICITY_CANDIDATES.names)
    write_table(frame, candidates_path(run, "bits"), MONOTONICITY_CANDIDATES, made)
    pair = ("errors", 0, 1, 1.0, 2.0, math.log(20), math.log(10), 0.7, 0.1, 7.0, 32, True)
    frame = pd.DataFrame([pair], columns=MONOTONICITY_PAIRS.names)
    write_table(frame, pairs_path(run, "bits"), MONOTONICITY_PAIRS, made)


def test_comparison_of_a_run_has_mean_spread_and_effort(run: Run) -> None:
    table = read_table(comparison_path(run), COMPARISON).set_index(["search", "quantity", "of"])
    assert table.loc[("evo", "perplexity", "novels"), ["mean", "spread", "n"]].tolist() == pytest.approx(
        [14, 8**0.5, 2]
    )
    assert table.loc[("uniform", "KL", "letters"), "mean"] == 1.0
    assert table.loc[("evo", "tokens", "judged, thousands"), "mean"] == 3.0
    assert table.loc[("evo", "time", "s"), "n"] == 2 and ("dense", "time", "s") not in table.index
    lines = text_path(comparison_path(run)).read_text().splitlines()
    assert any(line.startswith("evo ") and "14.00 ±2.83*" in line for line in lines)


def test_report_shows_every_study(run: Run) -> None:
    write_sections(StageContext(run), STUDIES)
    write_report(StageContext(run), SEARCHES, sections=[sections_path(run)])
    text = run.report.read_text()
    page = Page(text)
    assert page.fetched == [] and page.tags.count("script") == 1
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:4] == ["Comparison", "Comparison over seeds", "Monotonicity: bits", "Convergence"]
    grouped = [row for row in page.rows if row[0] == "evo"]
    assert len(grouped) == 1 and {"14.00 ±2.83", "3 ±1"} <= set(grouped[0])
    pair = next(row for row in page.rows if row[0] == "less summed error")
    assert pair[1:] == ["0, 1", "1, 2", "20, 10", "0.7000 ±0.1000", "7.0", "yes"]
    assert "1 of 1 pairs of less summed error confirmed as worse" in text
    slopes = [row[0] for row in page.rows if row[0] in ("1", "min(U(1,3), U(1,3))")]
    assert len(slopes) == 2
    assert page.tags.count("svg") == 2 * 3 + 4  # two curves and a map of two searches, and four figures of studies
    identifiers = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_without_studies_the_report_has_none(run: Run) -> None:
    write_report(StageContext(run), SEARCHES)
    assert "over seeds" not in run.report.read_text()


def test_names_cannot_break_out_of_a_figure() -> None:
    name = "<img src=x>&\"'"
    rows = [(name, "KL", name, "low", 4, 1.0, math.nan, 1), ("other", "KL", name, "low", 4, 2.0, 0.1, 2)]
    for svg in (
        comparison_figure(pd.DataFrame(rows, columns=COMPARISON.names)),
        progress_figure({name: [trace()]}, {name: name}),
    ):
        assert "<img" not in svg and "&lt;img src=x&gt;&amp;" in svg and Page(svg).tags.count("svg") == 1


def test_a_study_of_another_model_is_refused(run: Run) -> None:
    other = provenance({"groups": {}}, fingerprint="e" * 64)
    table = read_table(comparison_path(run), COMPARISON)
    write_table(table, comparison_path(run), COMPARISON, other)
    with pytest.raises(ArtifactError, match=r"comparison\.parquet: was made for another model"):
        write_sections(StageContext(run), STUDIES)
