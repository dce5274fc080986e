"""The processes of one search: which one this is, and the one thing that they exchange, sums (torch.distributed)."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evopress.util.errors import SearchError

_TIMEOUT = timedelta(days=7)
"""Waiting for another process is no error, however long: the one that started them all sees if one dies."""


class LostPeerError(SearchError):
    """Another process of the search went away; why, is its own to say."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; a single process has nobody to exchange with."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of this process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes of tensors of one shape and type, the same bytes in each.

        Raises:
            LostPeerError: another process is gone.
        """
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        with _peers():
            dist.all_reduce(moved)
        return moved.to(tensor.device)

    def share(self, text: str) -> str:
        """The text of the first process."""
        if self.count == 1:
            return text
        content = bytearray(text.encode()) if self.rank == 0 else bytearray()
        own = torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
        whole = torch.zeros(int(self.sum(torch.tensor(len(own)))), dtype=torch.uint8)
        whole[: len(own)] = own
        return bytes(self.sum(whole).numpy()).decode() if len(whole) else ""

    def in_parts(self, rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(rows)`` [rows, ...], of which each process makes nearly as many rows."""
        if self.count == 1:
            return make(rows)
        bounds = [rank * len(rows) // self.count for rank in (self.rank, self.rank + 1)]
        own = make(rows[slice(*bounds)])
        whole = own.new_zeros((len(rows), *own.shape[1:]))
        whole[slice(*bounds)] = own
        for row in whole:  # one at a time, as all may not fit on the device; float32 holds every 16-bit number
            row.copy_(self.sum(row.float()))
        return whole


@contextmanager
def joined(rank: int, count: int, device: torch.device, meeting: Path) -> Iterator[Ranks]:
    """Meet the other processes through the file ``meeting``, over gloo on CPUs and nccl on GPUs.

    Raises:
        LostPeerError: another process is gone.
    """
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this host, whatever its name resolves to
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _peers():
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=_TIMEOUT)
    yield Ranks(rank, count, device)
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(f"another process of the search is gone ({str(error).splitlines()[0]})") from error
