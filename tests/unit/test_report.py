"""The report: true numbers, one offline page, names that cannot break out of it."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from finished_run import (
    FINGERPRINT,
    make_results,
    provenance,
    tiny_model,
    write_configuration,
    write_model,
    write_tokens,
)
from report_page import Page, measure, measure_in_runtime, trace, write_way

from evopress.artifacts.exports import file_digests, write_export_manifest
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import PERPLEXITY, SECTIONS, VARIANTS, write_table
from evopress.config.context import StageContext
from evopress.report.comparison import WIDTH, Cell, Column, Comparison, compare, measured_column, summary
from evopress.report.page import write_report
from evopress.report.search_section import parent_curve
from evopress.report.sections import require_harmless
from evopress.util.errors import ArtifactError

SEARCHES = ["uniform", "evo"]
ON_TASKS = ["dense", *SEARCHES]


@pytest.fixture
def run(tmp_path):
    run = make_results(tmp_path)
    write_tokens(run, "novels")
    write_configuration(run, "uniform", level="3")
    write_configuration(run, "evo")
    write_way(run, "evo", evolved=True)
    write_way(run, "uniform", evolved=False)
    write_table(
        pd.DataFrame(columns=VARIANTS.names), run.variant_table("gptq", 0), VARIANTS, provenance({"bits": [2, 3]})
    )
    measure(run, "dense", 10.0, 0.0, 0.9)
    measure(run, "uniform", 20.0, 0.5, 0.6)
    measure(run, "evo", 15.0, 0.25, 0.605)
    return run


def test_table_of_the_page_holds_what_was_measured(run):
    write_report(StageContext(run), SEARCHES, on_tasks=ON_TASKS)
    rows = Page(run.report.read_text()).rows
    assert [row[0] for row in rows[:5]] == ["model", "dense", "uniform", "evo", "kind of layer"]
    assert rows[0][1:] == [
        "bitsper weight",
        "packed sizeMB",
        "perplexitynovels",
        "perplexityletters",
        "KLnovels",
        "KLletters",
        "agreementnovels",
        "agreementletters",
        "quizacc",
        "quizloss",
    ]
    assert rows[1][1] == "32.00" and rows[1][3:7] == ["10.00", "20.00", "0.0000", "0.0000"]
    assert rows[1][7:] == ["1.000", "1.000", "0.900 ±0.010", "1.000"]
    assert rows[2][1] == "3.00" and rows[2][3:6] == ["20.00", "40.00", "0.5000 ±0.0100"]
    assert rows[3][3:6] == ["15.00", "30.00", "0.2500 ±0.0100"]
    assert rows[3][7:9] == ["0.875 ±0.010", "0.750 ±0.010"]


def test_the_dense_model_is_told_by_its_name_and_not_by_its_place(run):
    write_report(StageContext(run), SEARCHES)
    text = run.report.read_text()
    assert re.findall(r'<tr class="dense"><th scope="row">(.*?)</th>', text) == ["dense"]
    assert ".models .dense" in text


def test_page_is_whole_and_fetches_nothing(run):
    write_report(StageContext(run), SEARCHES)
    text = run.report.read_text()
    page = Page(text)
    assert page.fetched == [] and page.tags.count("svg") == 3 and page.tags.count("script") == 1
    assert "url(http" not in text and "@import" not in text
    assert "Every layer is at level 3." in text and "found in 2 of 3 generations" in text
    assert "currentColor" in text and "#010203" not in text
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) > 0 and set(re.findall(r"url\(#([^)]+)\)", text)) == set(clips)


def test_page_is_the_same_bytes_each_time(run):
    write_report(StageContext(run), SEARCHES)
    first = run.report.read_bytes()
    write_report(StageContext(run), SEARCHES)
    assert run.report.read_bytes() == first


def test_names_from_outside_are_escaped(run):
    write_model(run, tiny_model(), {"source": "folder", "path": "/models/<script>alert(1)<"})
    frame = pd.DataFrame([("evo", "<img src=x>", 1.0, 1.0, 0.1, 0.5, 0.1, 1)], columns=PERPLEXITY.names)
    write_table(frame, run.perplexity("evo"), PERPLEXITY, provenance())
    write_report(StageContext(run), SEARCHES)
    page = Page(run.report.read_text())
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert "perplexity<img src=x>" in page.rows[0]


def test_summary_fits_the_terminal_and_says_where_things_lie(run):
    exports = [run.export("uniform", "huggingface"), run.export("evo", "huggingface"), run.export("evo", "archive")]
    write_report(StageContext(run), SEARCHES, exports)
    lines = run.summary.read_text().splitlines()
    assert lines[0] == f"tiny-llama, compressed ({run.root})"
    assert all(len(line) <= WIDTH for line in lines[2:] if str(run.root) not in line)
    tables = run.summary.read_text().split("\n\n")
    first = {line.split()[0]: line.split()[1:] for line in tables[1].splitlines()[3:]}
    assert first["dense"][0] == "32.00" and first["uniform"][2] == "20.00" and first["evo"][2] == "15.00*"
    places = [f"uniform as huggingface  {exports[0]}", f"evo as huggingface      {exports[1]}"]
    assert lines[-4:] == [*places, f"evo as archive          {exports[2]}", f"report                  {run.report}"]
    assert "; written as huggingface, archive" in run.report.read_text()


def test_the_quantized_file_that_the_model_comes_from_counts_as_the_dense_one(run):
    made = Provenance("export", "{}", FINGERPRINT)
    folder = run.export("evo", "gguf")
    folder.mkdir(parents=True)
    (folder / "evo.gguf").write_bytes(b"b" * 400_000)
    write_export_manifest(run, "evo", "gguf", file_digests(folder), made)
    manifest = json.loads(run.model_manifest.read_text())
    write_report(StageContext(run), SEARCHES, [folder])
    assert _row(run, "dense")[2:4] == ["-", "-"] and _row(run, "evo")[2] == "0.4"
    manifest["origin"]["gguf_bytes"] = 5_000_000
    run.model_manifest.write_text(json.dumps(manifest))
    write_report(StageContext(run), SEARCHES, [folder])
    assert _row(run, "dense")[2] == "5.0" and _row(run, "dense")[3] != "-"
    assert run.summary.read_text().splitlines()[-2] == f"evo as gguf  {folder / 'evo.gguf'}"


def _row(run, model):
    """Cells of a model in the comparison."""
    return next(row[1:] for row in Page(run.report.read_text()).rows if row[0] == model)


def test_files_in_the_runtime_have_a_table_of_their_own(run):
    write_report(StageContext(run), SEARCHES)
    assert "llama.cpp" not in run.report.read_text() and "llama.cpp" not in run.summary.read_text()
    measure_in_runtime(run, "dense", 200.0, 1.0)
    measure_in_runtime(run, "evo", 50.0, 1.5)
    write_report(StageContext(run), SEARCHES, in_runtime=["dense", "evo"])
    text = run.report.read_text()
    rows = [row for row in Page(text).rows if row[0] in ("dense (F16)", "evo")]
    assert [row[0] for row in rows] == ["evo", "dense (F16)", "evo"]  # the first is that of the comparison
    costs = ["100.0", "1,500.0", "1.50", "150.0", "1.50"]
    assert rows[2][1:] == ["50.0", *costs, *["12.75", "12.50", "0.00600"] * 2]
    assert "with 2\nthreads; dense is the original in F16" in text and "an error beyond 0.05" in text
    assert 'class="best">1.50' not in text
    lines = run.summary.read_text().splitlines()
    assert "GGUF files in llama.cpp" in lines and max(map(len, lines[2:-4])) <= WIDTH
    assert [line for line in lines if line.startswith("dense (F16) ")]


def test_text_that_is_not_held_out_is_named(run):
    write_report(StageContext(run), SEARCHES)
    assert "neither calibration nor search has seen" in run.report.read_text()
    text = {"source": "file", "path": "mine.txt"}
    write_tokens(run, "calibration", settings={**text, "tokens": 2048})
    write_tokens(run, "novels", settings=text)
    write_report(StageContext(run), SEARCHES)
    told = (
        "Warning: data.evaluation.novels reads the same text as data.calibration (mine.txt): its result is not held out"
    )
    assert told in run.report.read_text() and told in run.summary.read_text().splitlines()
    assert "neither calibration nor search has seen" not in run.report.read_text()


def test_many_columns_are_cut_into_tables_that_fit():
    comparison = Comparison()
    for number in range(20):
        for model in ("dense", "evo"):
            comparison.put(model, Column("perplexity", f"set{number:02d}", 2, "low"), Cell(1234.5 + number))
    text = summary(comparison, Run(Path("results/x")), "title", [])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert [f"set{number:02d}" in text for number in range(20)] == [True] * 20
    assert text.count("\ndense ") == text.count("\nevo ") > 1


@pytest.mark.parametrize(
    ("better", "first", "second", "best"),
    [
        ("low", Cell(1.0), Cell(2.0), "first"),
        ("high", Cell(1.0), Cell(2.0), "second"),
        ("", Cell(1.0), Cell(2.0), None),
        ("low", Cell(2.0), Cell(2.0), None),
        ("high", Cell(0.70, 0.07), Cell(0.75, 0.07), None),
        ("high", Cell(0.50, 0.07), Cell(0.75, 0.07), "second"),
        ("low", Cell(math.nan), Cell(2.0), None),
    ],
)
def test_best_is_marked_only_where_the_difference_exceeds_its_error(better, first, second, best):
    comparison, column = Comparison(), Column("x", "", 2, better)
    for model, cell in (("dense", Cell(0.0)), ("first", first), ("second", second)):
        comparison.put(model, column, cell)
    assert [model for model in comparison.rows if comparison.is_best(model, column)] == ([best] if best else [])


def test_a_divergence_within_its_error_is_not_marked(run):
    for kl, best in ((0.495, False), (0.25, True)):
        measure(run, "evo", 15.0, kl, 0.605)
        assert compare(run, SEARCHES).is_best("evo", measured_column("kl", "novels")) is best


def test_a_run_without_searches_still_has_a_report(run):
    write_report(StageContext(run), [])
    assert [row[0] for row in Page(run.report.read_text()).rows][:2] == ["model", "dense"]


def test_direction_of_a_metric_is_lm_evals_own(run):
    columns = {
        (column.title, column.subtitle): column.better for column in compare(run, SEARCHES, on_tasks=ON_TASKS).columns
    }
    assert columns["quiz", "acc"] == "high" and columns["quiz", "loss"] == "low"


def test_curve_follows_the_accepted_candidate_and_counts_every_token():
    curve = parent_curve(trace())
    assert curve["generation"].tolist() == [0, 1, 2, 3]
    assert curve["fitness"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert curve["tokens"].tolist() == [2200, 4400, 6600, 8800]


def test_a_table_of_another_model_is_refused(run):
    frame = pd.DataFrame([("evo", "novels", 1.0, 1.0, 0.1, 0.5, 0.1, 1)], columns=PERPLEXITY.names)
    write_table(frame, run.perplexity("evo"), PERPLEXITY, provenance(fingerprint="e" * 64))
    with pytest.raises(ArtifactError, match=r"evo/perplexity\.parquet: was made for another model"):
        write_report(StageContext(run), SEARCHES)
    assert not run.report.exists()


def test_a_missing_measurement_is_named(run):
    run.tasks("evo").unlink()
    with pytest.raises(ArtifactError, match=r"evaluation/evo/tasks\.parquet: missing; run the stage"):
        write_report(StageContext(run), SEARCHES, on_tasks=ON_TASKS)


def test_tasks_that_are_no_longer_asked_for_are_not_told(run):
    write_report(StageContext(run), SEARCHES)
    assert run.tasks("evo").exists() and "quiz" not in run.report.read_text() + run.summary.read_text()


def write_section(run, html, title="An experiment", **about):
    path = run.root / "sections" / "own.parquet"
    write_table(pd.DataFrame([(title, html)], columns=SECTIONS.names), path, SECTIONS, provenance(**about))
    return path


def test_a_section_from_elsewhere_stands_right_after_the_comparison(run):
    path = write_section(run, '<p class="soft">It <em>worked</em> &amp; held.<br></p>', title="<b>Ours</b>")
    write_report(StageContext(run), SEARCHES, sections=[path])
    text = run.report.read_text()
    assert re.findall("<h2>(.*?)</h2>", text)[:3] == ["Comparison", "&lt;b&gt;Ours&lt;/b&gt;", "Levels"]
    assert '<p class="soft">It <em>worked</em> &amp; held.<br></p>' in text


@pytest.mark.parametrize(
    ("html", "message"),
    [
        ("<script>alert(1)</script>", "<script> is none of the elements"),
        ('<meta http-equiv="refresh" content="0">', "<meta> is none of the elements"),
        ('<p onclick="alert(1)">x</p>', "<p onclick> runs code"),
        ('<svg><use xlink:href="https://example.org/a.svg#b"/></svg>', "<use xlink:href> runs code, or refers"),
        ("<div><p>x</p>", "<div> is not closed"),
        ("</div><p>x</p>", "</div> closes another element"),
        ("<p><em>x</p></em>", "</p> closes another element"),
        ("<p>x</p><!-- and so on", "holds a"),
        ("<!-- x --><p>x</p>", "holds a comment"),
        ("<!DOCTYPE html>", "holds a declaration"),
        ("<?xml x?>", "holds a processing instruction"),
        ('<p class="x', "holds a '<'"),
    ],
)
def test_a_section_that_could_break_the_page_is_refused(run, html, message):
    path = write_section(run, html)
    with pytest.raises(ArtifactError, match=r"own\.parquet: section 'An experiment': .*; mend what") as error:
        write_report(StageContext(run), SEARCHES, sections=[path])
    assert message in str(error.value)
    assert not run.report.exists()


def test_figures_of_the_report_may_stand_in_a_section(run):
    write_report(StageContext(run), SEARCHES)
    figures = re.findall("<svg.*?</svg>", run.report.read_text(), re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        require_harmless(figure)


def test_a_section_about_another_model_is_refused(run):
    path = write_section(run, "<p>x</p>", fingerprint="e" * 64)
    with pytest.raises(ArtifactError, match=r"own\.parquet: was made for another model"):
        write_report(StageContext(run), SEARCHES, sections=[path])
