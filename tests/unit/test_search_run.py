"""The search stage on disk: artifacts, faults, and restarts that change no byte."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_run import BLOCKS, FINGERPRINT, LAYERS, provenance
from search_run import COMPUTE, MIXED, SETTINGS, artifacts, fresh, prepare, progress

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import (
    CONFIGURATION,
    EFFORT,
    TOKENS,
    TRACE,
    VARIANTS,
    read_provenance,
    read_table,
    write_table,
)
from evopress.artifacts.tables import LAYERS as LAYER_SCHEMA
from evopress.config.context import ComputeSettings, StageContext
from evopress.search.base import Strategy
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.resume import ResumeFolder
from evopress.search.run import run_search
from evopress.search.strategies.uniform import Uniform
from evopress.util.errors import ArtifactError, ConfigError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("search"))


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return fresh(prepared, tmp_path / "run")


def test_evolution_writes_a_configuration_within_budget_and_its_trace(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "q", SETTINGS)
    configuration = read_table(run.configuration("q"), CONFIGURATION)
    layers = read_table(run.layers, LAYER_SCHEMA)
    assert sorted(configuration["unit"]) == sorted(layers["name"])
    assert set(configuration["variants"]) == {"gptq"}
    assert configuration["cost"].sum() == 3 * layers["parameters"].sum()
    assert not (configuration["level"] == "3").all(), "the search should have left its start"
    variants = {
        (row.name, row.level): (row.value, row.cost, row.bytes)
        for block in range(BLOCKS)
        for row in read_table(run.variant_table("gptq", block), VARIANTS).itertuples()
    }
    for row in configuration.itertuples():
        assert variants[row.unit, row.level] == (row.value, row.cost, row.bytes)
    assert not run.resume("q").exists()
    for path in (run.configuration("q"), run.trace("q")):
        made_by = read_provenance(path)
        assert (made_by.stage, made_by.model) == ("search", FINGERPRINT)
        assert json.loads(made_by.settings) == json.loads(SETTINGS.model_dump_json())


def test_the_trace_holds_every_evaluation(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="evopress"):
        run_search(StageContext(run, COMPUTE), "q", MIXED)
    (summary,) = (line for line in caplog.messages if "of the block work" in line)
    found = re.fullmatch(
        r"search q: (\d+) tokens of candidates at .* a second, ([\d.]+)% of the block work of .*", summary
    )
    assert int(found[1]) == read_table(run.effort("q"), EFFORT)["tokens"][0] and 0 < float(found[2]) < 100
    trace = read_table(run.trace("q"), TRACE)
    counts = trace.groupby(["generation", "step"]).size().to_dict()
    assert counts == {(0, 0): 4} | {(g, s): n for g in range(1, 7) for s, n in ((0, 6), (1, 4))}
    assert (trace.groupby("generation")["accepted"].sum() == 1).all()
    assert set(trace.loc[trace["candidate"] == -1, "step"]) == {1}
    assert set(trace["tokens"]) - {0} == {12, 18, 48}
    for row in trace[trace["tokens"] > 0].itertuples():  # the others were remembered
        lengths = np.diff([*range(0, row.tokens, 12), row.tokens])
        assert len(row.sequences) == len(row.fitness_by_sequence) == len(lengths)
        assert row.fitness == pytest.approx(np.dot(row.fitness_by_sequence, lengths) / row.tokens, rel=1e-6)


def test_uniform_writes_its_level_and_an_empty_trace(run: Run) -> None:
    run_search(StageContext(run, COMPUTE), "u", Uniform(variants="gptq", target=3.0))
    configuration = read_table(run.configuration("u"), CONFIGURATION)
    assert len(configuration) == BLOCKS * len(LAYERS) and set(configuration["level"]) == {"3"}
    assert read_table(run.trace("u"), TRACE).empty


@pytest.mark.parametrize("fitness", ["topk_kl", "perplexity"])
@pytest.mark.parametrize("rule", ["name", "none"])
def test_other_fitness_and_groups_run(run: Run, fitness: str, rule: str) -> None:
    changes = {"fitness": fitness, "group_rule": rule, "top_k": 5, "target": 2.5, "generations": 2}
    run_search(StageContext(run, COMPUTE), "q", SETTINGS.model_copy(update=changes))
    configuration = read_table(run.configuration("q"), CONFIGURATION)
    assert configuration["cost"].sum() <= 2.5 * configuration["parameters"].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 1.5}, "searches.q.target: 1.5 bits is below the lowest level (2)"),
        ({"target": 4.25}, "searches.q.target: 4.25 bits is above the highest level (4)"),
        ({"tokens": (18, 73)}, "searches.q.tokens[1]: asks for 73 tokens, but the search text has 72"),
        ({"fitness": "topk_kl", "top_k": 65}, "searches.q.top_k: 65 is more than the vocabulary has (64)"),
    ],
)
def test_bad_settings_leave_nothing_behind(run: Run, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_search(StageContext(run, COMPUTE), "q", SETTINGS.model_copy(update=changes))
    assert str(error.value).startswith(message)
    assert not run.configuration("q").exists() and not run.trace("q").exists()


def test_tokens_of_another_model_are_refused(run: Run) -> None:
    path = run.tokens("search")
    tokens = read_table(path, TOKENS)
    (run.root / "tokens").unlink()
    write_table(tokens, path, TOKENS, provenance(fingerprint="0" * 64))
    with pytest.raises(ArtifactError, match="made for another model"):
        run_search(StageContext(run, COMPUTE), "q", SETTINGS)


# --- death and restart ---------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evopress.search.run", "evopress.search.engine.evaluator"])


def _search_and_die(root: str, settings: Strategy, moment: tuple[str, int, int] | None) -> None:
    """Run the search; at the given call of the given function, send the process a signal."""
    torch.set_num_threads(1)
    if moment is not None:
        place, call, number = moment
        holder, name = {
            "judging": (ModelEvaluator, "evaluate"),
            "syncing": (os, "fsync"),
            "half a line": (ResumeFolder, "_append"),
        }[place]
        function, calls = getattr(holder, name), itertools.count(1)

        def dying(*args):
            if next(calls) == call:
                if place == "half a line":
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), number)
            return function(*args)

        setattr(holder, name, dying)
    run_search(StageContext(Run(Path(root)), COMPUTE), "q", settings)


def search_in_process(run: Run, settings: Strategy, moment: tuple[str, int, int] | None = None) -> int | None:
    process = CONTEXT.Process(target=_search_and_die, args=(str(run.root), settings, moment))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the search hangs"
    return process.exitcode


def test_killed_at_any_moment_and_restarted_ends_with_the_same_bytes(run: Run) -> None:
    whole = fresh(run, "whole")
    assert search_in_process(whole, MIXED) == 0
    # Syncs: two for the log's first line, one for each of 7 generations, two for each of four artifacts.
    for number, moments in enumerate(
        [
            [("judging", 1), ("judging", 4), ("judging", 9)],
            [("syncing", 1), ("syncing", 2), ("syncing", 3), ("syncing", 3)],
            [("half a line", 1), ("half a line", 3), ("half a line", 1)],
            [("syncing", 12), ("judging", 1), ("syncing", 1), ("syncing", 3)],
        ]
    ):
        killed = fresh(run, f"killed{number}")
        for moment in moments:
            assert search_in_process(killed, MIXED, (*moment, signal.SIGKILL)) == -signal.SIGKILL
            assert not killed.configuration("q").exists()
        assert search_in_process(killed, MIXED) == 0
        assert artifacts(killed) == artifacts(whole)
        assert progress(killed) == progress(whole)
        assert not killed.resume("q").exists()


def test_killed_by_the_clock_it_ends_with_the_same_bytes(run: Run) -> None:
    settings, moments = MIXED.model_copy(update={"generations": 40}), np.random.default_rng(0)
    whole, killed = fresh(run, "whole"), fresh(run, "killed")
    assert search_in_process(whole, settings) == 0
    finished = []
    for _ in range(6):
        process = CONTEXT.Process(target=_search_and_die, args=(str(killed.root), settings, None))
        process.start()
        log = killed.resume("q") / "log.jsonl"
        size = log.stat().st_size if log.exists() else 0
        end = time.monotonic() + 30
        while not (log.exists() and log.stat().st_size > size) and process.is_alive() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        finished.append(killed.configuration("q").exists())
    assert not all(finished)
    assert search_in_process(killed, settings) == 0
    assert artifacts(killed) == artifacts(whole)


def test_sigterm_saves_and_leaves_and_the_next_run_goes_on(run: Run) -> None:
    whole, stopped = fresh(run, "whole"), fresh(run, "stopped")
    assert search_in_process(whole, SETTINGS) == 0
    assert search_in_process(stopped, SETTINGS, ("judging", 6, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert not stopped.configuration("q").exists()
    last = (stopped.resume("q") / "log.jsonl").read_text().splitlines()[-1].partition(" ")[2]
    assert json.loads(last)["generation"] == 2
    assert search_in_process(stopped, SETTINGS) == 0
    assert artifacts(stopped) == artifacts(whole)


def test_a_restart_with_other_settings_starts_anew(run: Run) -> None:
    whole, changed = fresh(run, "whole"), fresh(run, "changed")
    assert search_in_process(whole, SETTINGS) == 0
    assert search_in_process(changed, MIXED, ("judging", 6, signal.SIGKILL)) == -signal.SIGKILL
    assert search_in_process(changed, SETTINGS) == 0
    assert artifacts(changed) == artifacts(whole)


def test_less_memory_changes_nothing_but_rounding(run: Run) -> None:
    settings = SETTINGS.model_copy(update={"generations": 2})
    run_search(StageContext(run, COMPUTE), "plenty", settings)
    run_search(StageContext(run, ComputeSettings(device="cpu", memory_gb=2e-5)), "scarce", settings)
    tables = [read_table(run.trace(name), TRACE) for name in ("plenty", "scarce")]
    np.testing.assert_allclose(*(table["fitness"] for table in tables), rtol=1e-3)
    chosen = [read_table(run.configuration(name), CONFIGURATION)["level"].tolist() for name in ("plenty", "scarce")]
    assert chosen[0] == chosen[1]
