"""What takes processes of its own: leases of devices, a search that is killed and goes on, one rank of a group."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from random_models import Machine
from search_run import MIXED, artifacts, fresh, prepare

from evopress.artifacts.paths import Run
from evopress.config.context import ComputeSettings, StageContext
from evopress.search.processes import Ranks, joined
from evopress.search.run import run_search
from evopress.util.accelerators import FOLDER_VARIABLE, Device, leased, usable_devices

PATIENCE_SECONDS = 60.0
STAND_INS = (Device("0", "GPU-stand-in-0"), Device("1", "GPU-stand-in-1"))
"""Devices of a machine that has none: leases are locks, and need no card."""
SEARCH = MIXED.model_copy(update={"generations": 60})


def leases(machine: Machine) -> dict[str, object]:
    """One job on each device; one more waits until a job is killed, and gets its device."""
    real = machine.device.type == "cuda"
    devices = usable_devices() if real else STAND_INS
    folder = machine.folder / "leases"
    folder.mkdir()
    jobs = [_start(machine, _hold, folder, real) for _ in devices]
    try:
        held = [_answer(told) for _, told in jobs]
        assert sorted(held) == sorted(device.entry for device in devices), f"leased {held}"
        one_more, told = _start(machine, _hold, folder, real)
        jobs.append((one_more, told))
        assert not told.poll(3.0 if real else 1.0), "one more job leased a device that another one holds"
        jobs[0][0].kill()
        assert _answer(told) == held[0], "the device of a job that was killed went to nobody"
    finally:
        for job, _ in jobs:
            job.kill()
            job.join()
    return {"devices": len(devices)}


def killed_search(machine: Machine) -> dict[str, object]:
    """A search that is killed (SIGKILL) goes on and ends with the same bytes."""
    prepared = prepare(machine.folder / "killed")
    compute = ComputeSettings(device=str(machine.device), memory_gb=0.01)
    whole, cut = fresh(prepared, "whole"), fresh(prepared, "cut")
    run_search(StageContext(whole, compute), "q", SEARCH)
    job, _ = _start(machine, _search, cut.root, compute)
    _wait_for(lambda: _generations(cut) >= 3)
    job.kill()
    job.join()
    after = _generations(cut)
    assert 0 < after < SEARCH.generations, "the search ended before it was killed"
    run_search(StageContext(cut, compute), "q", SEARCH)
    assert artifacts(cut) == artifacts(whole), "a search that was killed ended with other bytes"
    return {"generations": SEARCH.generations, "killed after": after}


def one_rank(machine: Machine) -> dict[str, object]:
    """A group of one process: nccl on a card, gloo on a CPU."""
    job, told = _start(machine, _join, machine.folder / "meeting", machine.device)
    found = _answer(told)
    job.join()
    assert found == "hello", f"a group of one process exchanged {found!r}"
    return {"backend": "nccl" if machine.device.type == "cuda" else "gloo"}


def _hold(told: Connection, folder: Path, real: bool) -> None:
    """Lease a device, tell which, and keep it."""
    os.environ[FOLDER_VARIABLE] = str(folder)
    find = usable_devices if real else lambda environment: STAND_INS
    with leased("auto", find=find) as devices:
        visible = torch.cuda.device_count() if real else 1
        told.send(devices[0].entry if visible == 1 else f"{visible} devices are visible")
        time.sleep(PATIENCE_SECONDS)


def _search(told: Connection, root: Path, compute: ComputeSettings) -> None:
    run_search(StageContext(Run(root), compute), "q", SEARCH)


def _join(told: Connection, meeting: Path, device: torch.device) -> None:
    """Exchange sums and a text as one of two processes would, in a group of one."""
    with joined(0, 1, device, meeting) as alone:
        ranks = Ranks(alone.rank, 2, alone.device)  # a single one exchanges nothing
        kept = bool((ranks.sum(torch.ones(3)) == 1).all())
        told.send(ranks.share("hello") if kept else "other sums")


def _start(machine: Machine, target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """Start a process that may tell something; CUDA bears no fork, and a fork spares the imports."""
    context = multiprocessing.get_context("spawn" if machine.device.type == "cuda" else "forkserver")
    told, tell = context.Pipe(duplex=False)
    job = context.Process(target=target, args=(tell, *arguments))  # type: ignore[attr-defined]
    job.start()
    tell.close()
    return job, told


def _answer(told: Connection) -> str:
    """What a process tells."""
    assert told.poll(PATIENCE_SECONDS), "a process told nothing"
    return str(told.recv())


def _generations(run: Run) -> int:
    """Finished generations of an unfinished search."""
    log = run.resume("q") / "log.jsonl"
    return log.read_bytes().count(b"\n") - 2 if log.exists() else -1


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.002)
