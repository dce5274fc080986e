"""How many accelerators a job can use: what the scheduler hands out, and what the job then leases."""

from evopress.config.compute import ComputeSettings
from evopress.search.base import Strategy


def devices_of_job(compute: ComputeSettings) -> int:
    """One for a job that runs a model, unless the settings ask for CPUs."""
    return 0 if compute.device == "cpu" else 1


def devices_of_search(search: Strategy, compute: ComputeSettings) -> int:
    """One for each process of a search that makes use of it."""
    return devices_of_job(compute) * search.workers(compute.processes)
