"""What every stage is given, whatever it does: the run, and where the work runs.

None of the settings here changes a result beyond rounding, so none makes a stage run again.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from evopress.artifacts.paths import Run
from evopress.config.base import Section

if TYPE_CHECKING:
    import torch


_CPU_GB = 4.0
"""Memory of a process where the settings name none: jobs share the host's with others."""
SHARE = 0.8
"""Of an accelerator's memory, the same: kernels have buffers of their own."""


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
    memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Memory for weights and hidden states, per process; null is 80 % of an accelerator, or 4 on a CPU.",
    )
    processes: int = Field(1, ge=1, description="Processes of a search, one accelerator each.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of a job; null is what the scheduler gives. On one machine, jobs that use fewer than "
        "`--cores` run side by side.",
    )
    blocks_per_job: int | None = Field(
        None,
        ge=1,
        description="Transformer blocks whose variants one job makes, one after the other; null is several of a small "
        "model, where starting a job takes as long as a block, and one of a large model.",
    )
    container: str = Field(
        "docker://python:3.11",
        min_length=1,
        description="Image for sites whose jobs must run in containers (`--software-deployment-method apptainer`); "
        "Python and evopress must lie in it, at the path of the ones that run Snakemake.",
    )

    @property
    def host_gb(self) -> float:
        """Memory of a process on a CPU; with an accelerator, of what is held packed on the host, and of a sweep.

        A sweep that compresses layers comes on top of weights and Hessians, and gains little from more.
        """
        return _CPU_GB if self.memory_gb is None else self.memory_gb


@dataclass(frozen=True)
class StageContext:
    """The run, and the machine that a stage works on."""

    run: Run
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    key: str = ""
    """Digest of all that the stage's result depends on (`workflow.keys`); kept with the result."""

    @cached_property
    def device(self) -> "torch.device":
        """Device of the work.

        Raises:
            ConfigError: the settings name one that is not there.
        """
        from evopress.util.device import resolve_device  # torch: not for those who only plan

        return resolve_device(self.compute.device)

    @property
    def memory_gb(self) -> float:
        """Memory for weights and hidden states on the device of the work.

        It follows from the kind of accelerator alone, so that a job that was killed goes on in chunks of the same size.
        """
        if self.device.type != "cuda" or self.compute.memory_gb is not None:
            return self.compute.host_gb
        from torch import cuda

        return SHARE * cuda.get_device_properties(self.device).total_memory / 1e9
