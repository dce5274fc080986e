"""The last words of a run that failed."""

import logging
import sys
from pathlib import Path

import pytest

from evopress.util.job_logs import BriefErrors, quiet_interrupts, why_failed

LINE = "2026-01-02 03:04:05,678"


def snakemake_log(folder: Path, **logs: str) -> Path:
    """A log of Snakemake that names logs of failed jobs with these contents."""
    named = []
    for name, text in logs.items():
        (folder / f"{name}.log").write_text(text)
        named.append(f"    log: {folder / name}.log (check log file(s) for error details)\n")
    path = folder / "snakemake.log"
    path.write_text("Error in rule variants:\n    jobid: 3\n" + "".join(named))
    return path


def test_the_last_error_of_each_job_is_told_once(tmp_path: Path) -> None:
    early = f"{LINE} ERROR an earlier attempt\n{LINE} INFO goes on\n"
    path = snakemake_log(
        tmp_path,
        first=f"{early}{LINE} ERROR layer: too narrow\n",
        second=f"{LINE} ERROR layer: too narrow\n",
        third=f"{LINE} INFO 3 of 4\n{LINE} ERROR fetch it:\n    snakemake model\n",
    )
    assert why_failed([path]) == "layer: too narrow\nfetch it:\n    snakemake model"


def test_a_traceback_is_told_by_its_last_line_and_a_killed_job_as_such(tmp_path: Path) -> None:
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 3\n'
    path = snakemake_log(tmp_path, a=f"{LINE} ERROR unexpected failure\n{trace}", b=f"{LINE} INFO 3 of 4\n", c="")
    first, second, third = why_failed([path]).splitlines()
    assert first == f"KeyError: 3 (unexpected; the whole traceback is in {tmp_path / 'a.log'})"
    assert second.startswith(f"{tmp_path / 'b.log'}: ended without an error of its own: killed, or out of memory?")
    assert second.endswith("3 of 4") and third.endswith("out of memory?")


def test_an_interrupted_run_is_one_line(tmp_path: Path) -> None:
    path = snakemake_log(tmp_path, a=f"{LINE} ERROR interrupted\n", b="")
    assert why_failed([path]) == "interrupted: the same command goes on from here"
    path.write_text("Terminating processes on user request, this might take some time.\n")
    assert why_failed([path]) == "interrupted: the same command goes on from here"


def test_without_logs_it_says_where_to_look(tmp_path: Path) -> None:
    assert why_failed([tmp_path / "none"]) == "a job failed; what it said stands above"


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", logging.ERROR, "", 0, message, (), None)
    made.__dict__.update(extra)
    return made


def test_failed_jobs_are_reported_without_code_and_repetitions() -> None:
    brief, job = BriefErrors(), record("", jobid=3, input=["a.parquet", "evopress/util/errors.py"])
    assert brief.filter(job) and job.input == ["a.parquet"]  # type: ignore[attr-defined]
    assert not brief.filter(record("RuleException:\nCalledProcessError in file x"))
    assert brief.filter(record("WorkflowError: settings"))
    assert brief.filter(record("Terminating processes on user request, this might take some time."))
    assert not brief.filter(record("", jobid=3, input=[]))


def test_ctrl_c_is_one_line_and_other_errors_are_told_as_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    quiet_interrupts()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    sys.excepthook(KeyError, KeyError(3), None)
    assert "KeyError: 3" in capsys.readouterr().err
