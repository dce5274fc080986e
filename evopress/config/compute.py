"""Where the work runs; nothing here changes a result beyond rounding, so nothing here makes a stage rerun."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from evopress.config.base import Section


def _device(name: str) -> str:
    """What torch calls a device, as far as the workflow can use it; told without torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N")
    return name


class ComputeSettings(Section):
    """Device, memory and processes."""

    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto",
        description="`auto`, `cpu`, `cuda` or `cuda:N`. A CPU without 16-bit arithmetic works in float32 on the same "
        "weights.",
    )
    memory_gb: float = Field(
        4.0, gt=0, allow_inf_nan=False, description="Memory for weights and hidden states, per process."
    )
    processes: int = Field(1, ge=1, description="Processes of a search, one accelerator each.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a job; null is what the scheduler gives.")
    container: str = Field(
        "docker://python:3.11",
        min_length=1,
        description="Image for sites whose jobs must run in containers (`--software-deployment-method apptainer`); "
        "Python and evopress must lie in it, at the path of the ones that run Snakemake.",
    )
