"""The live view of a run: logs, resume files and artifacts that others write meanwhile."""

import json
import os
import pty
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from search_run import MIXED, prepare

from evopress.artifacts.paths import Run
from evopress.cli.commands import main
from evopress.cli.watch import _key
from evopress.report.live import UnitNames, read_search, stage_row, unit_names
from evopress.search.evaluation import Effort, Minibatch, TraceRow
from evopress.search.resume import ResumeFolder
from evopress.search.run import open_problem
from evopress.search.selection import State
from evopress.util.job_logs import FINISHED, NAMES, JobLog, parse, read_logs, started
from evopress.workflow.history import History, begin
from evopress.workflow.settings import Settings, combined

STRATEGY = MIXED.model_dump_json()
COMMAND = ["python", "scripts/stage.py", "search", "--name", "q", "--strategy", STRATEGY]


def log_text(*messages: str, kind: str = "INFO") -> str:
    now = datetime.now().isoformat(" ", "seconds")
    return "".join(f"{now},123 {kind} {message}\n" for message in messages)


def test_the_last_attempt_of_a_job_counts() -> None:
    first = log_text(started("old", 1, ["python"])) + log_text("out of memory", kind="ERROR")
    assert parse("search/q", first, 0.0).state == "failed"
    assert parse("search/q", first, 0.0).message == "out of memory"
    text = first + log_text(
        started("node7", 42, COMMAND), "leased GPU-1, GPU-2", "search q: 3/60 generations, 2 generations/s, 28 s left"
    )
    job = parse("search/q", text, silence=3.0)
    assert (job.state, job.host, job.device, job.message) == ("running", "node7", "GPU-1, GPU-2", "")
    assert (job.what, job.done, job.total, job.unit) == ("search q", 3, 60, "generations")
    assert 0 < job.left <= 28
    assert list(job.command) == COMMAND
    assert parse("search/q", text, silence=3600.0).state == "silent"
    assert parse("search/q", text + log_text(FINISHED), silence=3600.0).state == "finished"
    assert parse("search/q", text + log_text("interrupted", kind="ERROR"), 0.0).state == "interrupted"
    assert parse("search/q", log_text("waiting for 1 of the devices 0: other jobs hold them"), 0.0).state == "waiting"


@pytest.mark.parametrize(
    "text",
    ["", "\ufffd\ufffd", "2026-11-29 10:34", log_text("started on a (process 1): 'cut")],
    ids=["empty", "no text", "cut", "half a line"],  # the last has the time of day
)
def test_a_log_that_is_half_written_or_damaged_is_of_a_running_job(text: str) -> None:
    job = parse("model", text, 0.0)
    assert (job.state, job.command, job.total) == ("running", (), 0)


def test_jobs_come_stage_by_stage(tmp_path: Path) -> None:
    for name in ("search/q", "model", "zzz", "variants/gptq/block_000"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.log").write_text(log_text(started("here", 1, [])))
    (tmp_path / "broken.log").symlink_to(tmp_path / "nowhere")
    assert [job.name for job in read_logs(tmp_path)] == ["model", "variants/gptq/block_000", "search/q", "zzz"]


def test_logs_of_other_settings_are_passed_over(tmp_path: Path) -> None:
    settings = Settings.load(combined([{"searches": {"evopress": None}}]))
    begin(History(tmp_path), [], settings)
    names = ("model", "variants/gguf/block_000", "variants/gone/block_000", "search/uniform", "search/evopress")
    names += ("export/uniform_gguf", "export/evopress_gguf", "evaluation/dense/perplexity", "studies/peers")
    for name in names:
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / f"{name}.log").write_text(log_text(started("here", 1, [])))
    kept = {job.name for job in read_logs(tmp_path / "logs")}
    assert kept == {name for name in names if "gone" not in name and "evopress" not in name}
    (tmp_path / "logs" / NAMES).write_text("[cut")
    assert {job.name for job in read_logs(tmp_path / "logs")} == set(names)


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a search that has finished three rounds, of which the second changed nothing."""
    run = prepare(tmp_path_factory.mktemp("watch"))
    space = open_problem(run, MIXED, "searches.q").space
    resume, rng = ResumeFolder(run.resume("q"), "digest"), np.random.default_rng(0)
    start = np.zeros(len(space.units), dtype=np.int16)
    moved = start.copy()
    moved[1] = 2
    for number, best in enumerate([start, moved, moved]):
        rows = [
            TraceRow(number, 0, 0, Minibatch((0,), (12,)), 0.5 - number / 10, (0.5,), accepted=True),
            TraceRow(number, 0, 1, Minibatch((0,), (12,)), 0.01, (0.5,), accepted=False),
        ]
        resume.save(State(number, best[None]), rng, rows, Effort(tokens=300, seconds=2.0))
    log = run.root / "logs" / "search" / "q.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        log_text(started("node7", 42, COMMAND), "leased GPU-1", "search q: 2/6 generations, 1 generations/s, 4 s left")
    )
    blocks = run.root / "logs" / "variants" / "gptq"
    blocks.mkdir(parents=True)
    (blocks / "block_000.log").write_text(log_text(started("node8", 1, []), FINISHED))
    manifest = json.loads(run.model_manifest.read_text())
    run.model_manifest.write_text(json.dumps({**manifest, "blocks": 2}))
    return run


def test_a_search_is_read_from_its_resume_log(searching: Run) -> None:
    (job,) = (job for job in read_logs(searching.root / "logs") if job.stage == "search")
    names = unit_names(searching, job)
    found = read_search(searching, "q", names)
    assert found is not None and (found.round, found.fitness) == (2, pytest.approx(0.3))
    assert found.tokens_per_second == pytest.approx(150.0)
    (move,) = found.moves
    assert (move.round, move.fitness) == (1, pytest.approx(0.4))
    assert move.changes == ("layers.0.self_attn.k_proj: 2 to 4",)
    without = read_search(searching, "q", UnitNames())
    assert without is not None and without.moves[0].changes == ("unit 1: level 0 to 2",)


def test_a_round_that_is_being_written_is_not_there_yet(searching: Run, tmp_path: Path) -> None:
    own = Run(tmp_path)
    own.resume("q").mkdir(parents=True)
    lines = (searching.resume("q") / "log.jsonl").read_bytes().splitlines(keepends=True)
    path = own.resume("q") / "log.jsonl"
    for content, rounds in (
        (b"", None),
        (lines[0], None),
        (b"".join(lines[:3]) + lines[3][:50], 1),
        (b"\xff" * 99, None),
    ):
        path.write_bytes(content)
        found = read_search(own, "q", UnitNames())
        assert (None if found is None else found.round) == rounds
    assert unit_names(own, JobLog("search/q", "running", command=tuple(COMMAND))) == UnitNames()


def test_one_frame_tells_what_runs(searching: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(searching.root)
    assert main(["watch", str(searching.root), "--once"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    assert " ".join(lines["search q"].split()[:10]) == "search q 0/1 running node7 GPU-1 search q: 2/6 generations"
    assert lines["variants gptq"].split()[:4] == ["variants", "gptq", "2/2", "finished"]
    jobs = [JobLog("variants/gptq/block_embedding", "finished")]
    assert stage_row(searching, "variants gptq", jobs, 2)[1:3] == ("2/3", "[yellow]waiting[/]")
    assert "search q: 2 rounds, fitness of the best 0.3, 150 tokens/s, 1 moves accepted" in printed
    assert "round 1: layers.0.self_attn.k_proj: 2 to 4; fitness 0.4" in printed
    assert contents(searching.root) == before


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_run_that_has_not_begun_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "nothing has run yet" in capsys.readouterr().out.replace("\n", " ")
    assert main(["watch", str(tmp_path / "none")]) == 1
    assert "give that of the run, results/<name>" in capsys.readouterr().err


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_q_and_ctrl_c_end_the_view_and_leave_the_terminal_as_it_was(searching: Run, key: bytes) -> None:
    here, there = pty.openpty()
    command = [sys.executable, "-m", "evopress", "watch", str(searching.root), "--seconds", "0.2"]
    process = subprocess.Popen(
        command, stdin=there, stdout=there, stderr=there, start_new_session=True, preexec_fn=lambda: own_terminal(there)
    )
    shown = b""
    end = time.monotonic() + 120
    while b"node7" not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(here, 4096)
    os.write(here, key)
    assert process.wait(timeout=60) == 0
    os.close(there)
    os.close(here)


def test_an_input_that_has_ended_is_no_reason_to_look_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    with Path(os.devnull).open() as ended:
        monkeypatch.setattr(sys, "stdin", ended)
        assert _key(2.0) == "" and naps == [2.0]


def own_terminal(descriptor: int) -> None:
    """Make a terminal the one whose Ctrl-C reaches this process."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
