"""Starting the processes of a search, and watching them: if one dies, all end, and the error says which and how.

The launcher is multiprocessing, which torchrun is built on. torchrun itself needs a port and a host name that resolves,
waits half a minute for processes that hang on a dead one, and reports whichever ended first, not what it died of.
"""

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from evopress.artifacts.manifest import set_aside
from evopress.config.compute import ComputeSettings
from evopress.search.processes.ranks import LostPeerError, joined
from evopress.util import errors
from evopress.util.device import device_of_rank
from evopress.util.errors import DamagedError, EvopressError, SearchError
from evopress.util.progress import log, log_file, setup_logging
from evopress.util.termination import EXIT_CODE, stop_on_sigterm

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Time that processes have to end by themselves after SIGTERM, or to show who died first."""
LOST_PEER = 75
"""Exit code of a process that ends because another one did."""
Target = Callable[..., None]
"""What each process runs: it is given `Ranks`, then the arguments."""


@dataclass(frozen=True)
class Worker:
    """A process, seen from the one that started it."""

    process: BaseProcess
    told: Connection
    """Holds (kind of error, message), if the process raised one."""


def run_in_processes(target: Target, arguments: tuple[Any, ...], compute: ComputeSettings) -> None:
    """Run ``target`` in ``compute.processes`` processes on this host.

    On SIGTERM the processes stop at the next good moment, and this one exits with code 143.

    Raises:
        SearchError: a process died.
        EvopressError: what a process raised.
    """
    with tempfile.TemporaryDirectory(prefix="evopress-") as folder, stop_on_sigterm() as check:
        meeting, workers = Path(folder) / "meeting", list[Worker]()
        try:
            for rank in range(compute.processes):
                workers.append(_start(target, arguments, compute, rank, meeting))
            _watch(workers, check)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


def threads_of_process(threads: int | None, processes: int) -> int:
    """Threads of each process: an equal share of the job's (more of them than cores makes everything crawl)."""
    return max(1, (threads or torch.get_num_threads()) // processes)


def _start(target: Target, arguments: tuple[Any, ...], compute: ComputeSettings, rank: int, meeting: Path) -> Worker:
    compute = compute.model_copy(update={"threads": threads_of_process(compute.threads, compute.processes)})
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(target, arguments, compute, rank, meeting, log_file(), tell))
    with _left_to_this_process(signal.SIGINT):
        process.start()
    tell.close()
    return Worker(process, told)


@contextmanager
def _left_to_this_process(number: signal.Signals) -> Iterator[None]:
    """Block a signal for processes that start meanwhile: a terminal sends Ctrl-C to all, and this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(workers: list[Worker], check: Callable[[], None]) -> None:
    """Wait until all have ended well.

    Raises:
        EvopressError: one has not.
        SystemExit: SIGTERM has come.
    """
    while running := [worker.process for worker in workers if worker.process.exitcode is None]:
        if any(worker.process.exitcode for worker in workers):
            break
        try:
            check()
        except SystemExit:
            for process in running:
                process.terminate()
            _wait(workers)
            raise
        wait([process.sentinel for process in running], POLL_SECONDS)
    if any(worker.process.exitcode for worker in workers):
        _wait(workers, until=lambda code: code != LOST_PEER)
        raise _error(workers)


def _wait(workers: list[Worker], until: Callable[[int], bool] = lambda code: False) -> None:
    """Wait until all have ended, or one with a code that satisfies ``until``, or the time of grace is over."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(worker.process.exitcode is None for worker in workers):
        if any(worker.process.exitcode and until(worker.process.exitcode) for worker in workers):
            return
        time.sleep(POLL_SECONDS)


def _error(workers: list[Worker]) -> EvopressError:
    """What the process that failed first has to say; one that merely lost its peers comes last."""
    codes = [worker.process.exitcode or 0 for worker in workers]
    told = {rank: words for rank, worker in enumerate(workers) if codes[rank] and (words := _words(worker))}
    for kind, message in told.values():
        if kind:
            error: EvopressError = getattr(errors, kind, SearchError)(message)
            return error
    failed = [rank for rank, code in enumerate(codes) if code]
    rank = min(failed, key=lambda rank: (codes[rank] == LOST_PEER, codes[rank] > 0))
    last_words = f" ({told[rank][1]})" if rank in told else ""
    return SearchError(
        f"process {rank} of the search ({len(workers)} in all) {_how(codes[rank])}{last_words}; run again: the search "
        f"goes on from its last round"
    )


def _words(worker: Worker) -> tuple[str, str] | None:
    """What the process told before it ended, if it did."""
    try:
        return worker.told.recv() if worker.told.poll() else None
    except (EOFError, OSError):
        return None


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


# --- in a process that was started -----------------------------------------------------------------------------------


def _work(
    target: Target,
    arguments: tuple[Any, ...],
    compute: ComputeSettings,
    rank: int,
    meeting: Path,
    log_path: Path | None,
    tell: Connection,
) -> NoReturn:
    """Run ``target``, then end at once with a code that says why, past any thread that waits for a lost process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        signal.signal(signal.SIGTERM, _leave)  # until the search takes it, which chooses its moment
        setup_logging(log_path if rank == 0 else None)
        if rank:
            log.setLevel(logging.WARNING)  # all would say the same
        torch.set_num_threads(compute.threads or 1)
        device = device_of_rank(compute.device, rank, compute.processes)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with joined(rank, compute.processes, device, meeting) as ranks:
            target(ranks, *arguments)
        code = 0
    except LostPeerError:
        code = LOST_PEER
    except DamagedError as error:
        tell.send(("ArtifactError", set_aside(error)))
    except EvopressError as error:
        tell.send((type(error).__name__, str(error)[:10_000]))  # no more than a pipe holds
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        log.exception("unexpected failure of process %d", rank)
        tell.send(("", f"{type(error).__name__}: {error}"[:200]))
    logging.shutdown()
    os._exit(code)


def _end_with_parent() -> None:
    """End when whoever started this process is gone, rather than live on as an orphan."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_CODE)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_CODE)
