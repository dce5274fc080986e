"""Loading weights beside the work of an accelerator, on a CUDA stream of its own.

On a CPU there is nothing to load beside: unpacking would take the very cores that run the blocks. There, weights are
loaded when they are used, and only the disk works ahead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """A weight, and what tells that it is there."""

    weight: Tensor
    ready: torch.cuda.Event | None = None


class SideStream:
    """A stream for loading; the current stream waits for each weight before it uses it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.finished: torch.cuda.Event | None = None

    @property
    def overlaps(self) -> bool:
        """Whether loading runs beside other work."""
        return self.stream is not None

    def load(self, load: Callable[[], Tensor]) -> Loaded:
        """Start to load a weight."""
        if self.stream is None:
            return Loaded(load())
        with torch.cuda.stream(self.stream):
            weight = load()
            # Memory of this stream is not given to another weight before the work that uses this one is done.
            weight.record_stream(torch.cuda.default_stream(self.device))
            return Loaded(weight, self.stream.record_event())

    def use(self, loaded: Loaded) -> Tensor:
        """The weight, for work that is queued from now on."""
        if loaded.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(loaded.ready)
        return loaded.weight

    def keep_pace(self) -> None:
        """A block's work has been queued: wait until that of the block before it is done.

        Weights that are dropped stay in memory until the work that uses them has run. Without this, the host would
        load far ahead of the device, and past the limit.
        """
        if self.stream is None:
            return
        before, self.finished = self.finished, torch.cuda.current_stream(self.device).record_event()
        if before is not None:
            before.synchronize()
