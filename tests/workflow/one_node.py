"""A real SLURM cluster of one node with two fake GPUs: `python one_node.py FOLDER`, as root.

Prints `ready` and runs until its standard input closes or a signal ends it, so that it does not outlive whoever started
it, however that one ended; then jobs are killed, both daemons stopped and the links in /etc/slurm removed. (SLURM_CONF
would not do: the executor takes it out of the environment of jobs.)
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

PARTITION = "main"
GPUS = 2
ETC = Path("/etc/slurm")
FILES = ("slurm.conf", "gres.conf")
DAEMONS = ("slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 30.0
"""Seconds that the node has to come up, and jobs to be gone."""

CONF = """
ClusterName=evopress-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
TaskProlog={folder}/prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=2
GresTypes=gpu
MinJobAge=3600
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:{gpus}
PartitionName={partition} Nodes={host} Default=YES MaxTime=UNLIMITED State=UP
"""
# Any character devices will do: SLURM only counts them and tells jobs their numbers.
GRES = "NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"
# The prolog of every task notes which devices the task was given.
PROLOG = '#!/bin/sh\necho "$SLURM_JOB_ID ${{CUDA_VISIBLE_DEVICES-}}" >> {folder}/devices\n'


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A running cluster, with everything that it writes below ``folder``."""
    _configure(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name in FILES:
            (ETC / name).symlink_to(folder / name)
        for daemon in DAEMONS:
            daemons.append(_start(daemon))
        _wait(["sinfo", "--noheader", "--format=%T"], "idle")
        yield
    finally:
        _ignore_signals()
        with suppress(subprocess.SubprocessError, TimeoutError):
            subprocess.run(["scancel", "--quiet", "--user=root"], check=True, timeout=PATIENCE)
            _wait(["squeue", "--noheader"], "")
        for process in reversed(daemons):
            _stop(process)
        for name in FILES:
            if (ETC / name).is_symlink() and (ETC / name).readlink() == folder / name:
                (ETC / name).unlink()


def _configure(folder: Path) -> None:
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    ports, host = _free_ports(), socket.gethostname().split(".")[0]
    for name, text in [*zip(FILES, (CONF, GRES), strict=True), ("prolog", PROLOG)]:
        text = text.format(folder=folder, ports=ports, host=host, gpus=GPUS, partition=PARTITION)
        (folder / name).write_text(text)
    (folder / "prolog").chmod(0o755)
    ETC.mkdir(exist_ok=True)


def _free_ports() -> tuple[int, ...]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in DAEMONS]
    ports = tuple(each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return ports


def _start(daemon: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL  # they have logs of their own
    return subprocess.Popen([daemon, "-D", "-c"], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(command: Sequence[str], answer: str) -> None:
    """Ask until ``answer`` is what the command says.

    Raises:
        TimeoutError: it never said so.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode == 0 and said.stdout.strip() == answer:
            return
        time.sleep(0.2)
    raise TimeoutError(f"{' '.join(command)}: {said.stdout} {said.stderr}")


def why_not() -> str:
    """What keeps this machine from running the cluster; empty if nothing does."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"SLURM is not installed: no {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client)"
    if os.geteuid() != 0:
        return "only root can start the daemons of SLURM"
    if present := [str(ETC / name) for name in FILES if os.path.lexists(ETC / name)]:
        return f"this machine has a cluster of its own: {', '.join(present)}"
    return ""


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, _leave)
    with cluster(Path(sys.argv[1])):
        print("ready", flush=True)
        sys.stdin.buffer.read()
