"""Searches and evaluations as TensorBoard events."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished_run import make_results, provenance

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import PERPLEXITY, TASKS, TRACE, write_table
from evopress.cli.commands import main
from evopress.search.evaluation import Minibatch, TraceRow
from evopress.search.resume import ResumeFolder
from evopress.search.selection import State


def rows_of(generation: int) -> list[TraceRow]:
    minibatch = Minibatch((0,), (8,))
    fitness = 0.5 - generation / 10
    return [
        TraceRow(generation, 0, 0, minibatch, fitness, (fitness,), accepted=True),
        TraceRow(generation, 0, 1, minibatch, 0.01, (0.01,), accepted=False),
    ]


def perplexity_row(**values: object) -> pd.DataFrame:
    return pd.DataFrame([values]).reindex(columns=PERPLEXITY.names, fill_value=0)


@pytest.fixture
def results(tmp_path: Path) -> Run:
    """A finished search with its evaluation, and one that goes on."""
    run = make_results(tmp_path)
    records = [row.record() for generation in range(3) for row in rows_of(generation)]
    write_table(pd.DataFrame(records, columns=TRACE.names), run.trace("done"), TRACE, provenance())
    measured = perplexity_row(search="done", dataset="held", perplexity=12.5, kl=0.25, tokens=100)
    write_table(measured, run.perplexity("done"), PERPLEXITY, provenance())
    tasks = pd.DataFrame([("done", "everyday", "acc", "none", 0.75, 0.05, 40)], columns=TASKS.names)
    write_table(tasks, run.tasks("done"), TASKS, provenance())
    resume = ResumeFolder(run.resume("going"), "digest")
    for generation in range(2):
        population = np.zeros((1, 4), dtype=np.int16)
        resume.save(State(generation, population), np.random.default_rng(0), rows_of(generation))
    return run


def test_events_hold_the_curves_of_searches_and_what_was_measured(results: Run, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before = {path: path.stat().st_mtime_ns for path in results.root.rglob("*")}
    for _ in range(2):  # the second call replaces what the first one wrote
        assert main(["track", str(results.root), "--tensorboard", str(tmp_path / "events")]) == 0
    assert {path: path.stat().st_mtime_ns for path in results.root.rglob("*")} == before
    found = {}
    for model in ("done", "going"):
        events = accumulator.EventAccumulator(str(tmp_path / "events" / "run" / model)).Reload()
        for tag in events.Tags()["scalars"]:
            found[model, tag] = [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
    assert found == {
        ("done", "search/fitness of the best"): [(0, 0.5), (1, 0.4), (2, 0.3)],
        ("done", "search/tokens judged"): [(0, 16), (1, 32), (2, 48)],
        ("done", "perplexity/held"): [(0, 12.5)],
        ("done", "KL to dense/held"): [(0, 0.25)],
        ("done", "tasks/everyday acc"): [(0, 0.75)],
        ("going", "search/fitness of the best"): [(0, 0.5), (1, 0.4)],
        ("going", "search/tokens judged"): [(0, 16), (1, 32)],
    }


def test_without_tensorboard_or_a_search_there_is_one_line_of_advice(
    results: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["track", str(results.root), "--tensorboard", str(tmp_path / "events")]) == 1
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert main(["track", str(tmp_path / "none"), "--tensorboard", str(tmp_path / "events")]) == 1
    assert "no search has begun there" in capsys.readouterr().err
