"""The processes of one search: all run the same program with the same seed, and the only thing they exchange is sums.

They are started by multiprocessing and talk through torch.distributed. torchrun does both, but needs a port and a host
name that resolves, waits half a minute for processes that hang on a dead one, and reports whichever ended first, not
what it died of.
"""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evopress.artifacts.manifest import set_aside
from evopress.config.context import ComputeSettings
from evopress.util.device import device_of_rank
from evopress.util.errors import ArtifactError, DamagedError, EvopressError, SearchError
from evopress.util.progress import EXIT_CODE, leave, log, log_file, setup_logging, stop_on_sigterm

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Time that processes have to end by themselves after SIGTERM."""
_TIMEOUT = timedelta(days=7)
"""Waiting for another process is no error, however long: the one that started them all sees if one dies."""
_GO_ON = "run again: the search goes on from its last round"


class LostPeerError(SearchError):
    """Another process of the search went away; why, is its own to say."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; a single process has nobody to exchange with."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes of tensors of one shape and type, the same bytes in each.

        Raises:
            LostPeerError: another process is gone.
        """
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        with _peers():
            dist.all_reduce(moved)
        return moved.to(tensor.device)

    def share(self, text: str) -> str:
        """The text of the first process."""
        if self.count == 1:
            return text
        own = torch.from_numpy(np.frombuffer(bytearray(text.encode() if self.rank == 0 else b""), dtype=np.uint8))
        whole = own.new_zeros(int(self.sum(torch.tensor(len(own)))))
        whole[: len(own)] = own
        return bytes(self.sum(whole).numpy()).decode()

    def in_parts(self, rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(rows)`` [rows, ...], of which each process makes nearly as many rows."""
        if self.count == 1:
            return make(rows)
        own = slice(*(rank * len(rows) // self.count for rank in (self.rank, self.rank + 1)))
        made = make(rows[own])
        whole = made.new_zeros((len(rows), *made.shape[1:]))
        whole[own] = made
        for row in whole:  # one at a time, as all may not fit on the device; float32 holds every 16-bit number
            row.copy_(self.sum(row.float()))
        return whole


@contextmanager
def joined(rank: int, count: int, device: torch.device, meeting: Path) -> Iterator[Ranks]:
    """Meet the other processes through the file ``meeting``, over gloo on CPUs and nccl on GPUs.

    Raises:
        LostPeerError: another process is gone.
    """
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this host, whatever its name resolves to
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _peers():
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=_TIMEOUT)
    yield Ranks(rank, count, device)
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostPeerError(f"another process of the search is gone ({reason}); {_GO_ON}") from error


# --- in the process that starts the others ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """A process, seen from the one that started it."""

    process: BaseProcess
    told: Connection
    """Holds the error that the process raised, if it did."""


def run_in_processes(target: Callable[..., None], arguments: tuple[Any, ...], compute: ComputeSettings) -> None:
    """Run ``target(ranks, *arguments)`` in each of ``compute.processes`` processes on this host.

    If one dies, all end. On SIGTERM they stop at the next good moment, and this process exits with code 143.

    Raises:
        SearchError: a process died.
        EvopressError: what a process raised.
    """
    workers = list[Worker]()
    threads = threads_of_process(compute.threads, compute.processes)
    compute = compute.model_copy(update={"threads": threads})
    with tempfile.TemporaryDirectory(prefix="evopress-") as folder, stop_on_sigterm() as check:
        try:
            for rank in range(compute.processes):
                workers.append(_start(rank, compute, Path(folder) / "meeting", log_file(), target, arguments))
            _watch(workers, check)
        except SystemExit:
            _terminate(workers)
            raise
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


def threads_of_process(threads: int | None, processes: int) -> int:
    """Threads of each process: an equal share of the job's (more of them than cores makes everything crawl)."""
    return max(1, (threads or torch.get_num_threads()) // processes)


def _start(*arguments: Any) -> Worker:
    """Start a process, which is spared Ctrl-C: a terminal sends it to all, and this one ends the others."""
    spawn = multiprocessing.get_context("spawn")
    told, tell = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(tell, *arguments))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    tell.close()
    return Worker(process, told)


def _watch(workers: Sequence[Worker], check: Callable[[], None]) -> None:
    """Wait until all have ended well.

    Raises:
        EvopressError: one has not.
        SystemExit: SIGTERM has come.
    """
    while True:
        codes = [worker.process.exitcode for worker in workers]
        for rank, code in enumerate(codes):
            if code:
                raise _error(workers[rank], code, f"process {rank} of the search ({len(workers)} in all)")
        if None not in codes:
            return
        running = [worker.process.sentinel for worker, code in zip(workers, codes, strict=True) if code is None]
        wait(running, POLL_SECONDS)
        check()


def _terminate(workers: Sequence[Worker]) -> None:
    """Tell all to stop, and wait until they have, or the time of grace is over."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))


def _error(worker: Worker, code: int, name: str) -> EvopressError:
    """The error that a process raised, or how it ended."""
    with suppress(EOFError, OSError):
        raised: EvopressError = worker.told.recv()
        return raised
    how = f"ended with exit code {code}"
    if code < 0:
        how = "was killed by " + next((one.name for one in signal.Signals if one == -code), f"signal {-code}")
    return SearchError(f"{name} {how}{' (out of memory?)' if -code == signal.SIGKILL else ''}; {_GO_ON}")


# --- in a process that was started -----------------------------------------------------------------------------------


def _work(
    tell: Connection,
    rank: int,
    compute: ComputeSettings,
    meeting: Path,
    log_path: Path | None,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> NoReturn:
    """Run ``target``, tell the error that it raises, and end at once, past any thread that waits for a lost process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        signal.signal(signal.SIGTERM, leave)  # until the search takes it, which chooses its moment
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
    except DamagedError as error:
        tell.send(ArtifactError(set_aside(error)))
    except EvopressError as error:
        if isinstance(error, LostPeerError):
            time.sleep(1.0)  # so that the one that is gone is seen first
        tell.send(type(error)(str(error)[:10_000]))  # no more than a pipe holds
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        log.exception("unexpected failure of process %d", rank)
        what = f"{type(error).__name__}: {error}"[:200]
        tell.send(SearchError(f"process {rank} of the search ({compute.processes} in all) failed ({what}); {_GO_ON}"))
    logging.shutdown()
    os._exit(code)


def _end_with_parent() -> None:
    """End when whoever started this process is gone, rather than live on as an orphan."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_CODE)
