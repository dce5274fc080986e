"""What every stage is given, whatever it does."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from evopress.artifacts.paths import Run
from evopress.config.compute import ComputeSettings

if TYPE_CHECKING:
    import torch


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
    def memory(self) -> float:
        """Bytes that weights and hidden states may take."""
        return self.compute.memory_gb * 1e9
