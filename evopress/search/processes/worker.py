"""One process of a search that runs in several: `python -m evopress.search.processes.worker FOLDER RANK`.

Started by `launch`, which holds the other end of standard input: when that closes, whoever started this process is
gone, and it ends at once rather than live on as an orphan.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from evopress.artifacts.manifest import set_aside
from evopress.search.processes.job import LOST_PEER, JobFolder
from evopress.search.processes.ranks import LostPeerError, joined
from evopress.search.processes.termination import EXIT_CODE
from evopress.search.stage import search
from evopress.util.device import device_of_rank
from evopress.util.errors import ArtifactError, DamagedError, EvopressError
from evopress.util.progress import log, setup_logging


def main(folder: JobFolder, rank: int) -> None:
    """Take part in the search.

    Raises:
        EvopressError: as `stage.search`.
    """
    job, log_file = folder.read_job()
    setup_logging(log_file if rank == 0 else None)
    if rank:
        log.setLevel(logging.WARNING)  # all would say the same
    count = job.compute.processes
    torch.set_num_threads(threads_of_process(job.compute.threads, count))
    device = device_of_rank(job.compute.device, rank, count)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    compute = job.compute.model_copy(update={"device": str(device), "processes": 1})
    with joined(rank, count, device, folder.meeting) as ranks:
        search(job.run, job.name, job.settings, compute, job.trust_remote_code, ranks)


def threads_of_process(threads: int | None, processes: int) -> int:
    """Threads of each process: an equal share of the job's (more of them than cores makes everything crawl)."""
    return max(1, (threads or torch.get_num_threads()) // processes)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(EXIT_CODE)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(EXIT_CODE)


def _run(folder: JobFolder, rank: int) -> NoReturn:
    """End the process at once with a code that says why, past any thread that waits for a lost process."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, _leave)  # until the search takes it, which chooses its moment
        main(folder, rank)
        code = 0
    except LostPeerError:
        code = LOST_PEER
    except DamagedError as error:
        folder.write_error(rank, ArtifactError(set_aside(error)))
    except EvopressError as error:
        folder.write_error(rank, error)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        log.exception("unexpected failure of process %d", rank)
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run(JobFolder(Path(sys.argv[1])), int(sys.argv[2]))
