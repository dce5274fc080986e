"""What the logs of a run tell of its jobs: which run, where, how far they are, what they took, and why one failed.

Logs are read while others write.
"""

import json
import logging
import re
import resource
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType

_TAIL = 1 << 18
"""Bytes at the end of a log that are read."""
_RECORD = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (INFO|WARNING|ERROR) (.*)", re.MULTILINE)
_STARTED = re.compile(r"started on (\S+) \(process \d+\): (.*)")
_PROGRESS = re.compile(
    r"(?P<what>.+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>.+?), \S+ (?P=unit)/s, (?P<left>\S+) s left"
)
INTERRUPTED = "interrupted"
"""What a job logs that Ctrl-C has ended."""
FINISHED = "finished"
"""What a job logs last."""
SILENT_SECONDS = 600.0
"""A job that has logged nothing for so long may have been killed: it tells of progress far more often."""
ORDER = (
    "model",
    "tokens",
    "hessians",
    "variants",
    "effects",
    "search",
    "polish",
    "export",
    "evaluation",
    "card",
    "report",
)
"""Folders and files below `logs/`, in the order of the stages."""


NAMES = "names.json"
"""File below `logs/`: what belongs to the settings of the last start (`evopress.workflow.slices.log_names`)."""


def started(host: str, process: int, command: Sequence[str]) -> str:
    """What a job logs first."""
    return f"started on {host} (process {process}): {shlex.join(command)}"


@dataclass(frozen=True)
class JobLog:
    """What the last attempt of a job has logged."""

    name: str
    """Path below `logs/`, without its ending, as in `search/evopress`."""
    state: str
    """running, waiting (for a device), silent, finished, failed or interrupted."""
    host: str = ""
    device: str = ""
    """As it was leased; empty on a CPU."""
    command: tuple[str, ...] = ()
    """What was started, to be run by hand."""
    what: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    left: float = float("nan")
    """Seconds that were left when the job last told, less those since then."""
    message: str = ""
    """The last error."""

    @property
    def stage(self) -> str:
        """The first part of the name."""
        return self.name.split("/")[0]


def read_logs(folder: Path) -> list[JobLog]:
    """All jobs that have a log below ``folder``, stage by stage; what cannot be read is left out.

    So are logs that earlier settings left, as of a search that was renamed.
    """
    names = _names(folder / NAMES)
    paths = [path for path in sorted(folder.rglob("*.log")) if _belongs(path.relative_to(folder), names)]
    found = [job for path in paths for job in _read(path, folder)]
    return sorted(found, key=lambda job: ORDER.index(job.stage) if job.stage in ORDER else len(ORDER))


def _names(path: Path) -> dict[str, list[str]]:
    """Names that count, by folder; none where that is not told, or cannot be read."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _belongs(log: Path, names: Mapping[str, Sequence[str]]) -> bool:
    folder, *inside = log.with_suffix("").parts
    return not inside or folder not in names or inside[0] in names[folder]


def _read(path: Path, folder: Path) -> Iterator[JobLog]:
    with suppress(OSError):
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL))
            text = stream.read().decode("utf-8", errors="replace")
        silence = time.time() - path.stat().st_mtime
        yield parse(path.relative_to(folder).with_suffix("").as_posix(), text, silence)


def parse(name: str, text: str, silence: float) -> JobLog:
    """The last attempt in the ``text`` of a log, which was written to ``silence`` seconds ago."""
    records = _RECORD.findall(text)
    starts = [index for index, record in enumerate(records) if _STARTED.match(record[2])]
    own = records[starts[-1] :] if starts else records
    start = _STARTED.match(own[0][2]) if starts else None
    leases = [message.removeprefix("leased ") for _, _, message in own if message.startswith("leased ")]
    facts = JobLog(
        name,
        _state(own, silence),
        host=start[1] if start else "",
        device=leases[-1] if leases else "",
        command=_command(start[2]) if start else (),
        message=next((message for _, kind, message in reversed(own) if kind == "ERROR"), ""),
    )
    return _with_progress(facts, own)


def _command(text: str) -> tuple[str, ...]:
    with suppress(ValueError):  # cut short
        return tuple(shlex.split(text))
    return ()


def _state(records: Sequence[tuple[str, str, str]], silence: float) -> str:
    _, kind, message = records[-1] if records else ("", "", "")
    if message == FINISHED:
        return "finished"
    if kind == "ERROR":
        return "interrupted" if message == INTERRUPTED else "failed"
    if message.startswith("waiting for "):
        return "waiting"
    return "running" if silence < SILENT_SECONDS else "silent"


def _with_progress(job: JobLog, records: Sequence[tuple[str, str, str]]) -> JobLog:
    """With what its last line of progress says."""
    for moment, _, message in reversed(records):
        found = _PROGRESS.match(message)
        if found:
            since = (datetime.now() - datetime.fromisoformat(moment)).total_seconds()
            left = max(0.0, float(found["left"]) - since)
            done, total = int(found["done"]), int(found["total"])
            return replace(job, what=found["what"], done=done, total=total, unit=found["unit"], left=left)
    return job


_COST = re.compile(r"took ([\d.]+) s, at most ([\d.]+) GB of memory(?: and ([\d.]+) GB on the device)?")
_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which the kernel counts resident memory."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of one job."""

    seconds: float
    memory_gb: float
    """Most that one of its processes held on the host."""
    device_gb: float = 0.0
    """Most that its first process held on accelerators."""

    def __str__(self) -> str:
        device = f" and {self.device_gb:.3f} GB on the device" if self.device_gb else ""
        return f"took {self.seconds:.1f} s, at most {self.memory_gb:.3f} GB of memory{device}"


def cost_since(started: float) -> Cost:
    """What this process took since ``started`` (`time.monotonic`); memory is that of its whole life."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    held = max(resource.getrusage(which).ru_maxrss for which in processes) * _UNIT
    device = 0
    torch = sys.modules.get("torch")  # a job that has not imported it holds nothing on a device
    if torch is not None and torch.cuda.is_initialized():
        device = sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return Cost(time.monotonic() - started, held / 1e9, device / 1e9)


def read_cost(log: Path) -> Cost | None:
    """What the last finished job took that wrote this log; None if none did."""
    found = _COST.findall(log.read_text(encoding="utf-8", errors="replace"))
    return Cost(*(float(number or 0) for number in found[-1])) if found else None


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
        """Print one line for Ctrl-C, and the usual traceback for all else."""
        if issubclass(kind, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def why_failed(snakemake_logs: Iterable[str | Path]) -> str:
    """One line or more for each job that failed, from the logs that Snakemake names; the last error of each."""
    texts = [text for path in snakemake_logs if (text := _text_of(Path(path)))]
    logs = dict.fromkeys(name for text in texts for names in _LOG.findall(text) for name in names.split(", "))
    told = dict.fromkeys(line for log in logs for line in _told(Path(log)))  # blocks may fail alike
    if INTERRUPTED in told or any(_TERMINATING in text for text in texts):
        return f"{INTERRUPTED}: the same command goes on from here"
    return "\n".join(told) or "a job failed; what it said stands above"


def _told(log: Path) -> Iterator[str]:
    text = _text_of(log)
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


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
