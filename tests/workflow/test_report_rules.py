"""The report of a run that the workflow made, and what Snakemake's own report shows of it."""

from pathlib import Path
from typing import Any

import pytest
from planning import Checkout

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import EFFORT, PROGRESS, read_table
from evopress.report.costs import cost_rows
from evopress.search.progress import SHARE

pytestmark = pytest.mark.workflow


@pytest.fixture
def run(finished: Checkout) -> Run:
    return Run(finished.root / "results/tiny")


def test_the_report_tells_what_each_stage_took_beside_the_plan(run: Run) -> None:
    names = {"model", "tokens", "hessians", "variants gptq", "search evo", "export", "perplexity", "tasks", "report"}
    rows = {row[0]: row[1:] for row in cost_rows(run, ["evo"])[1:]}
    assert set(rows) == names and rows["perplexity"][0] == "2"
    page = run.report.read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in names)
    planned = page.partition('<th scope="row">search evo</th>')[2].partition("</tr>")[0]
    assert "<td>-</td>" not in planned, "the plan knows of no search"


def test_the_settings_that_the_report_shows_are_those_of_the_run(run: Run) -> None:
    page = run.report.read_text()
    assert "complete: true" in page and "name: tiny" in page and "generations: 2" in page


def test_the_progress_of_the_search_took_few_tokens(run: Run) -> None:
    way, spent = read_table(run.progress("evo"), PROGRESS), read_table(run.effort("evo"), EFFORT)["tokens"].item()
    judged = way["part"].iloc[0] * way.drop_duplicates(["candidate", "fitness"]).shape[0]
    assert judged <= max(SHARE * spent, 4 * 64)  # or one sequence each


def test_snakemakes_own_report_has_captions_and_categories(
    finished: Checkout, settings: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "snakemake.html"
    ended = finished.run(settings, "--report", str(target))
    assert ended.returncode == 0, ended.stderr
    text = target.read_text()
    for told in ("Comparison", "Levels", "Tables", "level maps side by side", "levels.png", "held-out text"):
        assert told in text, told
