"""Long steps: their progress, as a bar on a terminal and plain lines in the log, and a good moment to stop them."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

log = logging.getLogger("evopress")
LOG_SECONDS = 10.0
"""Time between two progress lines of a log."""


def setup_logging(path: Path | None) -> None:
    """Send log lines to the file ``path``, and to standard error where that is not a terminal (bars go there)."""
    handlers: list[logging.Handler] = []
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, mode="a", encoding="utf-8"))
    if path is None or not sys.stderr.isatty():
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    log.handlers[:] = handlers
    log.propagate = False


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without a word: whoever writes the results will say so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Let the system's errors pass."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_file() -> Path | None:
    """The file that log lines go to, if they do."""
    return next((Path(h.baseFilename) for h in log.handlers if isinstance(h, logging.FileHandler)), None)


def note(text: str) -> None:
    """Write a line to the log file alone: the terminal of whoever started the job has no use for it."""
    record = log.makeRecord(log.name, logging.INFO, "", 0, text, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class Progress:
    """Counts work done; ``advance`` may be called as often as is convenient.

    What is ``brief`` is done many times over and mostly soon: it is told of only while it takes long.
    """

    def __init__(self, description: str, total: int, unit: str, *, brief: bool = False) -> None:
        self.description, self.total, self.unit, self.brief = description, total, unit, brief
        self.done = 0
        self.started = self.reported = time.monotonic()
        self.bar = tqdm(
            total=total,
            desc=description,
            unit=f" {unit}",
            unit_scale=True,
            leave=False,
            delay=LOG_SECONDS if brief else 0,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more units; ``note`` is shown beside the rate."""
        self.done += amount
        if self.done > self.total:  # it was an estimate
            self.total = self.bar.total = self.done
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        now = time.monotonic()
        if now - self.reported >= LOG_SECONDS or (self.done >= self.total and not self.brief):
            self.reported = now
            log.info("%s", self.line(now, note))

    def line(self, now: float, note: str = "") -> str:
        """One line: done of total, rate, time left."""
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        tail = f", {note}" if note else ""
        counts = f"{self.done}/{self.total} {self.unit}"
        return f"{self.description}: {counts}, {rate:.3g} {self.unit}/s, {left:.0f} s left{tail}"


@contextmanager
def progress(description: str, total: int, unit: str = "steps", *, brief: bool = False) -> Iterator[Progress]:
    """Report the progress of the enclosed work."""
    state = Progress(description, total, unit, brief=brief)
    try:
        yield state
    finally:
        state.bar.close()


EXIT_CODE = 128 + signal.SIGTERM


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: leave with the exit code that shells have for it, unwinding the stack."""
    raise SystemExit(128 + number)


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], None]]:
    """Yield a function to call between pieces of work: it raises SystemExit(143) once SIGTERM has come.

    The signal only sets a flag, so no write is cut short. Outside of the main thread signals cannot be caught, and the
    function does nothing.
    """
    received = threading.Event()

    def check() -> None:
        """Leave if the signal has come."""
        if received.is_set():
            raise SystemExit(EXIT_CODE)

    def handle(signum: int, frame: FrameType | None) -> None:
        """Note that the signal has come."""
        received.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)
