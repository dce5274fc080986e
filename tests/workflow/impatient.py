"""Snakemake that asks a cluster for news every second: the executor doubles its patience while tiny jobs end.

Where `scontrol` does not answer within ten seconds (a busy machine), the executor takes it that jobs are forgotten
early and asks `sacct` instead, which knows nothing without accounting: it would wait for ever. So it is told.

While it asks, the executor's list of active jobs is empty, and an interrupt then cancels none. It asks every 40 seconds
elsewhere; here an interrupt waits until it has asked.
"""

import asyncio
import signal
import threading

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

_resting = threading.Event()
_cancel = RemoteExecutor.cancel


async def _second(executor: RemoteExecutor) -> None:
    _resting.set()
    await asyncio.sleep(1)
    _resting.clear()


def _cancel_between(executor: RemoteExecutor) -> None:
    _resting.wait(timeout=60)
    _cancel(executor)


if __name__ == "__main__":
    import snakemake_executor_plugin_slurm as plugin  # not where tests only ask for this file's path

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell start without it
    RemoteExecutor.sleep = _second
    RemoteExecutor.cancel = _cancel_between
    plugin.get_min_job_age = lambda: 3600  # MinJobAge of one_node.py
    main()
