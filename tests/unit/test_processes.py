"""A search in two processes: the same result as in one, and what happens when one of them is killed."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from search_run import COMPUTE, MIXED, artifacts, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, PROGRESS, TRACE, read_table
from evopress.config.context import ComputeSettings, StageContext
from evopress.search import processes
from evopress.search.processes import Ranks, threads_of_process
from evopress.search.run import run_search
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.greedy import Greedy
from evopress.util.errors import ConfigError, SearchError

TWO = ComputeSettings(device="cpu", memory_gb=0.01, processes=2, threads=2)
SETTINGS = MIXED.model_copy(update={"generations": 40})
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evopress.search.run"])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(prepared: Run) -> Run:
    """Searched by two processes without a fault."""
    own = fresh(prepared, "whole")
    run_search(StageContext(own, TWO), "q", SETTINGS)
    return own


def test_two_processes_find_what_one_finds(prepared: Run, whole: Run) -> None:
    one = fresh(prepared, "one")
    torch.set_num_threads(1)
    run_search(StageContext(one, COMPUTE), "q", SETTINGS)
    tables = [read_table(run.trace("q"), TRACE) for run in (one, whole)]
    # float32 sums of other batches differ by rounding; divergences are near 0.1
    np.testing.assert_allclose(*(table["fitness"] for table in tables), rtol=1e-4)
    for column in ("generation", "step", "candidate", "tokens", "accepted"):
        assert tables[0][column].tolist() == tables[1][column].tolist()
    levels = [read_table(run.configuration("q"), CONFIGURATION)["level"].tolist() for run in (one, whole)]
    assert levels[0] == levels[1]
    ways = [read_table(run.progress("q"), PROGRESS) for run in (one, whole)]
    np.testing.assert_allclose(*(way["fitness"] for way in ways), rtol=1e-4)
    assert ways[0][["generation", "tokens", "part"]].equals(ways[1][["generation", "tokens", "part"]])
    assert not whole.resume("q").exists()


def test_other_strategies_use_two_processes_too(prepared: Run) -> None:
    one, two = fresh(prepared, "greedy_one"), fresh(prepared, "greedy_two")
    settings = Greedy(variants="gptq", target=2.7, tokens=24, per_round=4, group_rule="none")
    torch.set_num_threads(1)
    run_search(StageContext(one, COMPUTE), "q", settings)
    run_search(StageContext(two, TWO), "q", settings)
    tables = [read_table(run.trace("q"), TRACE) for run in (one, two)]
    np.testing.assert_allclose(*(table["fitness"] for table in tables), rtol=1e-4)
    levels = [read_table(run.configuration("q"), CONFIGURATION)["level"].tolist() for run in (one, two)]
    assert levels[0] == levels[1]


def generations(run: Run) -> int:
    """Finished generations in the resume log."""
    log = run.resume("q") / "log.jsonl"
    return log.read_bytes().count(b"\n") - 2 if log.exists() else -1


def wait_for(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.002)


def workers_of(pid: int) -> list[int]:
    """Processes of the search that ``pid`` started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"--multiprocessing-fork" in command:
            found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _search(root: str, settings: Evolution) -> None:
    run_search(StageContext(Run(Path(root)), TWO), "q", settings)


@contextmanager
def running(run: Run, after: int) -> Iterator[tuple[multiprocessing.Process, list[int]]]:
    """A job that has finished some generations more, and its processes."""
    job = CONTEXT.Process(target=_search, args=(str(run.root), SETTINGS))
    before = generations(run)
    job.start()
    wait_for(lambda: generations(run) >= before + after)
    yield job, workers_of(job.pid)
    job.join(20)
    assert job.exitcode is not None, "the job hangs"


def test_death_and_restart_change_no_byte_and_leave_no_orphan(prepared: Run, whole: Run) -> None:
    killed = fresh(prepared, "killed")
    with running(killed, 3) as (job, workers):
        assert len(workers) == 2
        os.kill(job.pid, signal.SIGTERM)
        start = time.monotonic()
        job.join(20)
    assert job.exitcode == 128 + signal.SIGTERM and time.monotonic() - start < 8
    assert not any(map(alive, workers))
    saved = generations(killed)
    assert saved >= 2
    with running(killed, 5) as (job, workers):
        os.kill(job.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, workers)), 8)
    done = generations(killed)
    assert saved + 5 <= done < SETTINGS.generations and not killed.configuration("q").exists()
    run_search(StageContext(killed, TWO), "q", SETTINGS)
    assert artifacts(killed) == artifacts(whole)


def test_a_killed_process_ends_the_job_with_an_error_that_names_it(
    prepared: Run, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh(prepared, "one_dies")
    for rank in (1, 0):
        before = max(0, generations(run))
        with monkeypatch.context() as patch:
            kill_process(run, rank, before + 2, patch)
        assert generations(run) >= before + 2 and not run.configuration("q").exists()
    run_search(StageContext(run, TWO), "q", SETTINGS)
    assert artifacts(run) == artifacts(whole)


def kill_process(run: Run, rank: int, when: int, patch: pytest.MonkeyPatch) -> None:
    """Run the search and kill one of its processes once ``when`` generations are finished."""
    start, started, died = processes._start, [], []
    patch.setattr(processes, "_start", lambda *args: started.append(start(*args)) or started[-1])

    def kill() -> None:
        wait_for(lambda: generations(run) >= when)
        started[rank].process.kill()
        died.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SearchError, match=rf"^process {rank} of the search \(2 in all\) was killed by SIGKILL"):
        run_search(StageContext(run, TWO), "q", SETTINGS)
    assert time.monotonic() - died[0] < 8
    assert all(worker.process.exitcode is not None for worker in started)
    thread.join()


def test_an_error_of_a_process_is_the_error_of_the_job(prepared: Run) -> None:
    run = fresh(prepared, "error")
    with pytest.raises(ConfigError, match=r"^searches.q.tokens.1.: asks for 73 tokens, but the search text has 72"):
        run_search(StageContext(run, TWO), "q", SETTINGS.model_copy(update={"tokens": (18, 73)}))
    assert not run.configuration("q").exists()


def fails(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("the disk is on fire")
    ranks.sum(torch.ones(1))


def test_what_a_process_says_last_is_part_of_the_error() -> None:
    with pytest.raises(
        SearchError, match=r"^process 1 of the search .* failed \(ValueError: the disk is on fire\); run again"
    ):
        processes.run_in_processes(fails, (), TWO)


def shares(ranks: Ranks, folder: Path) -> None:
    text = ranks.share("written by the first" if ranks.rank == 0 else "")
    rows = torch.arange(7.0)[:, None].to(torch.bfloat16)
    made = ranks.in_parts(rows, lambda own: own * 2)
    numbers = ranks.sum(torch.tensor([0.1, 0.2], dtype=torch.float64) * (ranks.rank + 1))
    (folder / f"{ranks.rank}").write_text(json.dumps([text, made.flatten().tolist(), numbers.tolist()]))


def test_all_processes_get_the_same_text_rows_and_sums(tmp_path: Path) -> None:
    processes.run_in_processes(shares, (tmp_path,), TWO)
    told = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert told[0] == told[1]
    assert told[0][:2] == ["written by the first", [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]]
    assert told[0][2] == pytest.approx([0.3, 0.6])


def test_processes_share_the_threads() -> None:
    assert [threads_of_process(*case) for case in [(8, 2), (2, 2), (1, 2), (7, 3)]] == [4, 1, 1, 2]
