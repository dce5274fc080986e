"""Where the work runs; nothing here changes a result beyond rounding, so nothing here makes a stage rerun."""

from pydantic import Field

from evopress.config.base import Section


class ComputeSettings(Section):
    """Device, memory and processes."""

    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    memory_gb: float = Field(4.0, gt=0, description="Memory for weights and hidden states, per process.")
    processes: int = Field(1, ge=1, description="Processes of a search, one accelerator each.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a job; null is what the scheduler gives.")
    container: str = Field(
        "docker://python:3.11",
        min_length=1,
        description="Image for sites whose jobs must run in containers (`--software-deployment-method apptainer`); "
        "Python and evopress must lie in it, at the path of the ones that run Snakemake.",
    )
