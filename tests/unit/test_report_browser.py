"""The report in a browser: its script runs, tables sort by a click, and nothing is wider than the window."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from finished_run import make_results, provenance, write_configuration, write_tokens
from report_page import Page, measure, write_way

from evopress.artifacts.tables import VARIANTS, write_table
from evopress.config.context import StageContext
from evopress.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_results(tmp_path_factory.mktemp("browser"))
    write_tokens(run, "novels")
    searches = ("uniform", "a-search-with-a-name-that-is-rather-long-for-a-narrow-window", "evo")
    write_table(pd.DataFrame(columns=VARIANTS.names), run.variant_table("gptq", 0), VARIANTS, provenance())
    measure(run, "dense", 10.0, 0.0, 0.9)
    for number, search in enumerate(searches):
        write_configuration(run, search, level=None if number else "3")
        write_way(run, search, evolved=number > 0)
        measure(run, search, 1000.0 - 990 * number / 2, 0.5 - 0.2 * number, 0.6)
    write_report(StageContext(run), searches)
    return run.report


def shown(page: Path, folder: Path, script: str = "", width: int = 1400) -> str:
    """The page as a browser has it after a ``script`` of the test's own, which the page would not let run."""
    text = page.read_text()
    if script:
        text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{script}</script></body>")
    copy = folder / "page.html"
    copy.write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [str(BROWSER), *options, f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_script_of_the_page_runs_as_it_is(page: Path, tmp_path: Path) -> None:
    assert 'title="sort by this column"' in shown(page, tmp_path)


@pytest.mark.parametrize(
    ("clicks", "order"), [(1, ["10.00", "10.00", "505.00", "1,000.00"]), (2, ["1,000.00", "505.00", "10.00", "10.00"])]
)
def test_a_click_sorts_a_table_by_numbers(page: Path, tmp_path: Path, clicks: int, order: list[str]) -> None:
    titles = Page(page.read_text()).rows[0]
    column = titles.index("perplexitynovels")
    click = f"document.querySelectorAll('.models thead th')[{column}].click();"
    rows = Page(shown(page, tmp_path, click * clicks)).rows
    assert [row[column] for row in rows[1:5]] == order


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_window(page: Path, tmp_path: Path, width: int) -> None:
    frame = tmp_path / "frame.html"  # no window of Chromium is narrower than 500 pixels
    measure = "const root = frame.contentDocument.documentElement; document.title = `${root.scrollWidth} of ${width}`;"
    code = f"const frame = document.querySelector('iframe'), width = {width}; frame.onload = () => {{ {measure} }};"
    inner = f"<iframe src='{page.as_uri()}' style='width: {width}px; height: 900px; border: 0'></iframe>"
    frame.write_text(f"<!doctype html><title>none</title>{inner}<script>{code}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *options, "--allow-file-access-from-files", "--window-size=1600,900", "--dump-dom"]
    found = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    needed, given = re.findall(r"<title>(\d+) of (\d+)</title>", found)[0]
    assert int(needed) <= int(given) == width
