"""Starting the processes of a search, and watching them: if one dies, all end, and the error says which and how."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evopress.search.processes import worker
from evopress.search.processes.job import LOST_PEER, Job, JobFolder
from evopress.search.processes.termination import stop_on_sigterm
from evopress.util.errors import EvopressError, SearchError
from evopress.util.progress import log_file

__all__ = ["Job", "run_in_processes"]

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Time that processes have to end by themselves after SIGTERM, or to show who died first."""


def run_in_processes(job: Job) -> None:
    """Run a search with ``job.compute.processes`` processes on this host.

    On SIGTERM the processes stop at the next good moment, and this one exits with code 143.

    Raises:
        SearchError: a process died.
        EvopressError: what a process raised.
    """
    with tempfile.TemporaryDirectory(prefix="evopress-") as path, stop_on_sigterm() as check:
        folder = JobFolder(Path(path))
        folder.write_job(job, log_file())
        with _started(folder, job) as processes:
            _watch(processes, folder, check)


@contextmanager
def _started(folder: JobFolder, job: Job) -> Iterator[list[subprocess.Popen]]:
    """The running processes; none of them is left behind, however this ends."""
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(job.compute.processes):
            processes.append(_start(folder, job, rank))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()


def _start(folder: JobFolder, job: Job, rank: int) -> subprocess.Popen:
    threads = worker.threads_of_process(job.compute.threads, job.compute.processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this host, whatever its name resolves to
    command = [sys.executable, "-m", worker.__name__, str(folder.path), str(rank)]
    with _left_to_this_process(signal.SIGINT):
        if rank == 0:
            return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        with folder.output(rank).open("wb") as output:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=output, env=environment)


@contextmanager
def _left_to_this_process(number: signal.Signals) -> Iterator[None]:
    """Block a signal for processes that start meanwhile: a terminal sends Ctrl-C to all, and this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(processes: list[subprocess.Popen], folder: JobFolder, check: Callable[[], None]) -> None:
    """Wait until all have ended well.

    Raises:
        EvopressError: one has not.
        SystemExit: SIGTERM has come.
    """
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            break
        try:
            check()
        except SystemExit:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            _wait(processes)
            raise
        time.sleep(POLL_SECONDS)
    if any(process.returncode for process in processes):
        time.sleep(POLL_SECONDS)
        _wait(processes, until=lambda code: code != LOST_PEER)
        raise _error(processes, folder)


def _wait(processes: list[subprocess.Popen], until: Callable[[int], bool] = lambda code: False) -> None:
    """Wait until all have ended, or one with a code that satisfies ``until``, or patience ends."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.returncode and until(process.returncode) for process in processes):
            return
        time.sleep(POLL_SECONDS)


def _error(processes: list[subprocess.Popen], folder: JobFolder) -> EvopressError:
    """What the process that failed first has to say; one that merely lost its peers comes last."""
    codes = [process.poll() for process in processes]
    failed = [rank for rank, code in enumerate(codes) if code]
    told = [error for error in map(folder.read_error, failed) if error is not None]
    if told:
        return told[0]
    rank = min(failed, key=lambda rank: (codes[rank] == LOST_PEER, (codes[rank] or 0) > 0))
    return SearchError(
        f"process {rank} of the search ({len(processes)} in all) {_how(codes[rank])}{_last_words(folder, rank)}; run "
        f"again: the search goes on from its last generation"
    )


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _last_words(folder: JobFolder, rank: int) -> str:
    """The last line that the process wrote to standard error; the first process's went to the terminal and the log."""
    try:
        lines = folder.output(rank).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    words = [line for line in lines if line.strip()]
    return f" ({words[-1].strip()[:200]})" if words else ""
