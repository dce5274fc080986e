"""The processes of one search: who this one is, and how they exchange tensors (torch.distributed)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evopress.util.errors import SearchError

_PATIENCE = timedelta(days=7)
"""Waiting for another process is no error, however long: the one that started them all sees if one dies."""


class LostPeerError(SearchError):
    """Another process of the search went away; why, is its own to say."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; a single process has nobody to exchange with."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where tensors lie that are exchanged."""

    def rows(self, total: int, rank: int | None = None) -> slice:
        """Which of ``total`` rows are a process's, of nearly equal shares."""
        number = self.rank if rank is None else rank
        return slice(number * total // self.count, (number + 1) * total // self.count)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of process ``source``, of a shape and dtype that all know.

        Raises:
            LostPeerError: another process is gone.
        """
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        with _peers():
            dist.broadcast(moved.view(torch.uint8), source)  # bytes: not every backend knows every dtype
        return moved.to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes.

        Raises:
            LostPeerError: another process is gone.
        """
        if self.count == 1:
            return tensor
        moved = tensor.to(self.device)
        with _peers():
            dist.all_reduce(moved)
        return moved.to(tensor.device)

    def join_rows(self, rows: Tensor, total: int) -> Tensor:
        """[total, ...] from the rows that each process has made (`rows`), row by row.

        Raises:
            LostPeerError: another process is gone.
        """
        if self.count == 1:
            return rows
        joined = rows.new_empty((total, *rows.shape[1:]))
        joined[self.rows(total)] = rows
        for source in range(self.count):
            for row in joined[self.rows(total, source)]:
                row.copy_(self.broadcast(row, source))
        return joined


@contextmanager
def joined(rank: int, count: int, device: torch.device, meeting: Path) -> Iterator[Ranks]:
    """Meet the other processes through the file ``meeting``, over gloo on CPUs and nccl on GPUs.

    Raises:
        LostPeerError: another process is gone.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _peers():
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=_PATIENCE
        )
    yield Ranks(rank, count, device)
    dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(f"another process of the search is gone ({str(error).splitlines()[0]})") from error


def in_parts(ranks: Ranks, tokens: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(tokens)`` [rows, ...], of which each process makes its own rows."""
    if ranks.count == 1:
        return make(tokens)
    return ranks.join_rows(make(tokens[ranks.rows(len(tokens))]), len(tokens))
