"""Why a run of the workflow has failed, in the words of its jobs: the last thing that the terminal shows."""

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

INTERRUPTED = "interrupted"
"""What a job logs that Ctrl-C has ended."""
_LOG = re.compile(r"^ +log: (.+?) \(check log", re.MULTILINE)
_ERROR = re.compile(r"^\S+ \S+ ERROR (.*(?:\n(?!\d{4}-\d\d-\d\d ).*)*)", re.MULTILINE)
_TERMINATING = "Terminating processes on user request"


class BriefErrors(logging.Filter):
    """Lets Snakemake report a failed job without the files of code among its inputs, and its command but once.

    After Ctrl-C the jobs that it ends are no failures, and not reported.
    """

    interrupted = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Change a record, or hold it back."""
        message = record.getMessage()
        self.interrupted = self.interrupted or _TERMINATING in message
        of_a_job = hasattr(record, "jobid") and hasattr(record, "input") and record.levelno >= logging.ERROR
        of_its_command = "CalledProcessError" in message
        if of_a_job:
            inputs = record.__dict__["input"] or []
            record.__dict__["input"] = [path for path in map(str, inputs) if not path.endswith(".py")]
        return not (of_its_command or (self.interrupted and of_a_job))


def quiet_interrupts() -> None:
    """Let Ctrl-C end this process with one line, wherever it is met; all else is reported as usual."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def why_failed(snakemake_logs: Iterable[str | Path]) -> str:
    """One line or more for each job that failed, from the logs that Snakemake names; the last error of each."""
    texts = [text for path in snakemake_logs if (text := _read(Path(path)))]
    logs = dict.fromkeys(name for text in texts for names in _LOG.findall(text) for name in names.split(", "))
    told = dict.fromkeys(line for log in logs for line in _told(Path(log)))  # blocks may fail alike
    if INTERRUPTED in told or any(_TERMINATING in text for text in texts):
        return f"{INTERRUPTED}: the same command goes on from here"
    return "\n".join(told) or "a job failed; what it said stands above"


def _told(log: Path) -> Iterator[str]:
    text = _read(log)
    errors = _ERROR.findall(text)
    if errors:
        message = errors[-1].rstrip()
        if "Traceback (most recent call last)" in message:  # a fault of ours: the last line says which
            message = f"{message.splitlines()[-1]} (unexpected; the whole traceback is in {log})"
        yield message
    else:
        lines = text.rstrip().splitlines()
        last = f"; its last line: {lines[-1]}" if lines else ""
        yield f"{log}: ended without an error of its own: killed, or out of memory?{last}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
