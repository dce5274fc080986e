"""The front in report and summary: points in the order of their sizes, the knee, what is worse, and what it took."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from finished_run import make_results, provenance, write_configuration, write_tokens
from report_page import Page, measure, trace, write_way

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import (
    CONFIGURATION,
    EFFORT,
    LLAMA_CPP,
    PEERS,
    TRACE,
    VARIANTS,
    read_provenance,
    read_table,
    write_table,
)
from evopress.config.context import StageContext
from evopress.report.front import knee
from evopress.report.page import write_report
from evopress.search.evaluation import Effort, effort_table
from evopress.search.strategies.front import Front
from evopress.workflow.searches import repeated

SIZES, KLS = (60, 70, 80, 90), (0.8, 0.3, 0.2, 0.15)


def write_front(run: Run, fitness: tuple[float, ...], seeds: tuple[int, ...] | None = None) -> list[str]:
    """Searches of a front as if they had been run: each with an equal configuration, but its own KL and fitness."""
    sizes = [size * 1000 for size in SIZES]
    front = Front(variants="gptq", sizes=sizes, seeds=seeds)
    searches = repeated({"curve": front})
    for number, (name, search) in enumerate(searches.items()):
        point = number // len(seeds or (0,))
        configuration = write_configuration(run, name)
        configuration["bytes"] += 100 * point
        settings = provenance(json.loads(search.model_dump_json()))
        write_table(configuration, run.configuration(name), CONFIGURATION, settings)
        rows = trace()
        rows.loc[rows.index[-1], "fitness"] = fitness[point]
        write_way(run, name, evolved=True)
        write_table(rows, run.trace(name), TRACE, provenance())
        measure(run, name, 10 + KLS[point], KLS[point] + 0.01 * (number % 2) * bool(seeds), 0.6)
        effects = search.effects()
        assert effects is not None
        write_table(effort_table(Effort(10_000, 1.0)), run.effects_effort(effects.name), EFFORT, provenance())
    return list(searches)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_results(tmp_path)
    write_tokens(run, "novels")
    write_configuration(run, "even", level="3")
    write_way(run, "even", evolved=False)
    bits = provenance({"bits": [2, 3]})
    write_table(pd.DataFrame(columns=VARIANTS.names), run.variant_table("gptq", 0), VARIANTS, bits)
    measure(run, "dense", 10.0, 0.0, 0.9)
    measure(run, "even", 20.0, 0.5, 0.6)
    return run


def report(run: Run, searches: list[str]) -> tuple[str, str]:
    """HTML and summary."""
    write_report(StageContext(run), ["even", *searches], fronts=["curve"])
    return run.report.read_text(), run.summary.read_text()


def table_in(summary: str) -> list[list[str]]:
    lines = summary[summary.index("Front curve") :].split("\n\n")[1].splitlines()
    return [line.split() for line in lines]


def test_the_summary_has_a_line_for_each_size_and_the_knee(run: Run) -> None:
    _, summary = report(run, write_front(run, (0.8, 0.3, 0.2, 0.15)))
    head, *rows = table_in(summary)
    assert head[:4] == ["size", "MB", "perplexity", "novels"]
    assert [row[0] for row in rows] == [f"curve-{size}kb" for size in SIZES]
    assert [row[-1] == "knee" for row in rows] == [False, True, False, False]
    assert "worse" not in summary
    spent = int(read_table(run.trace("curve-60kb"), TRACE)["tokens"].sum())
    assert f"Front curve: {10_000 + 4 * spent:,} tokens judged, 10,000 of them for the effects" in summary
    assert f"{(10_000 + 4 * spent) / (10_000 + spent):.1f} times what one search for one size takes" in summary


def test_sizes_beyond_which_nothing_is_gained_end_in_the_knee(run: Run) -> None:
    searches = write_front(run, (0.8, 0.4, 0.1, 0.1))
    for name, kl in zip(searches, (0.8, 0.4, 0.1, 0.1), strict=True):
        measure(run, name, 10.0, kl, 0.6)
    write_table(
        read_table(run.configuration(searches[2]), CONFIGURATION),
        run.configuration(searches[3]),
        CONFIGURATION,
        read_provenance(run.configuration(searches[3])),
    )
    _, summary = report(run, searches)
    _, *rows = table_in(summary)
    assert rows[2][-1] == "knee" and rows[2][1] == rows[3][1]
    assert " ".join(rows[3][-6:]) == "no more bytes were of use"


def test_a_point_that_is_worse_than_a_smaller_one_is_named(run: Run) -> None:
    html, summary = report(run, write_front(run, (0.8, 0.3, 0.31, 0.15)))
    (worse,) = [row for row in table_in(summary) if "worse" in row]
    assert worse[0] == "curve-80kb"
    assert "where curve-80kb did not do as well as a smaller file" in html
    assert "no larger file does worse" in report(run, write_front(run, (0.8, 0.3, 0.3, 0.15)))[0]


def test_the_page_draws_the_points_and_links_them_to_their_levels(run: Run) -> None:
    html, _ = report(run, write_front(run, (0.8, 0.3, 0.2, 0.15)))
    page = Page(html)
    assert page.fetched == []
    for size in SIZES:
        assert f'xlink:href="#levels-curve-{size}kb"' in html and f'<h4 id="levels-curve-{size}kb">' in html
    assert 'xlink:href="#levels-even"' in html
    assert "curve-70kb" in [row[0] for row in page.rows]


def test_seeds_are_a_mean_with_a_spread(run: Run) -> None:
    _, summary = report(run, write_front(run, (0.8, 0.3, 0.2, 0.15), seeds=(0, 5)))
    _, *rows = table_in(summary)
    assert [row[0] for row in rows] == [f"curve-{size}kb" for size in SIZES]
    assert "0.8050 ±0.0071" in summary


def test_files_of_llama_cpp_are_drawn_beside_the_points(run: Run) -> None:
    searches = write_front(run, (0.8, 0.3, 0.2, 0.15))
    rows = [
        ("Q4", "Q4", "Q4", maker, 75_000, text, 12.0, 0.4, 100)
        for maker in (LLAMA_CPP, "evo")
        for text in ("novels", "letters")
    ]
    path = run.root / "peers.parquet"
    write_table(pd.DataFrame(rows, columns=PEERS.names), path, PEERS, provenance())
    write_report(StageContext(run), ["even", *searches], fronts=["curve"], peers=path)
    html = run.report.read_text()
    assert html.count(">Q4<") == 4  # on each of four panels once, without a link
    assert "#search-Q4" not in html


@pytest.mark.parametrize(
    ("sizes", "heights", "expected"),
    [
        ([1, 2, 3], [1.0, 0.2, 0.0], 1),
        ([1, 2, 3, 10], [1.0, 0.5, 0.1, 0.0], 2),
        ([10, 20, 30], [1.0, 0.5, 0.0], None),  # a straight line
        ([1, 2, 3], [1.0, 0.9, 0.0], None),  # bends the other way
        ([1, 2], [1.0, 0.0], None),
        ([1, 2, 3], [1.0, math.nan, 0.0], None),
        ([1, 2, 3], [0.0, 0.5, 1.0], None),
    ],
)
def test_the_knee_is_the_point_farthest_below_the_chord(
    sizes: list[float], heights: list[float], expected: int | None
) -> None:
    assert knee(sizes, heights) == expected
