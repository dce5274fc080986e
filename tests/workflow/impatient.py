"""Snakemake that asks a cluster for news every second: the executor doubles its patience while tiny jobs end.

Where `scontrol` does not answer within ten seconds (a busy machine), the executor takes it that jobs are forgotten
early and asks `sacct` instead, which knows nothing without accounting: it would wait for ever. So it is told.
"""

import asyncio
import signal

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _second(executor: RemoteExecutor) -> None:
    await asyncio.sleep(1)


if __name__ == "__main__":
    import snakemake_executor_plugin_slurm as plugin  # not where tests only ask for this file's path

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell start without it
    RemoteExecutor.sleep = _second
    plugin.get_min_job_age = lambda: 3600  # MinJobAge of one_node.py
    main()
