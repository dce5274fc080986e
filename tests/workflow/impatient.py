"""Snakemake that asks a cluster for news every second: the executor doubles its patience while tiny jobs end."""

import asyncio
import signal

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _second(executor: RemoteExecutor) -> None:
    await asyncio.sleep(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell start without it
    RemoteExecutor.sleep = _second
    main()
