"""Where the time of an evaluation goes: every matrix product, attention, KL and unpacking is timed as it is called."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Phases(TorchFunctionMode):
    """Seconds by phase, on a CPU; the time of a phase inside another counts for the inner one only."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Time linear layers and attention apart from what is around them."""
        call = lambda: func(*args, **(kwargs or {}))  # noqa: E731
        if func is torch.nn.functional.linear:
            phase = f"{self._stack[-1] if self._stack else 'other'}: matrix products"
            self.flops[phase] += 2.0 * args[0].numel() * args[1].shape[0]
            return self.timed(phase, call)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.timed("attention", call)
        return call()

    def timed(self, phase: str, call: Callable[[], Any]) -> Any:
        """Result of ``call``, timed as ``phase``."""
        self._switch()
        self._stack.append(phase)
        try:
            return call()
        finally:
            self._switch()
            self._stack.pop()

    def wrapped(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as ``phase`` at every call."""
        return lambda *args, **kwargs: self.timed(phase, lambda: function(*args, **kwargs))

    @contextmanager
    def measure(self) -> Iterator["Phases"]:
        """Time the enclosed work; what no phase claims is `other`."""
        self._since = time.perf_counter()
        self._stack = ["other"]
        with self:
            yield self
        self._switch()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


CPU_SHAPES = ((4096, 576, 1536), (4096, 1536, 576), (2048, 2048, 2048))
CARD_SHAPES = ((8192, 2048, 8192), (8192, 4096, 14336), (8192, 8192, 8192))
"""Rows, inner size and columns of products like those of a block, and of a large square one."""


def peak_gflops(dtype: torch.dtype, seconds: float = 1.0, device: torch.device | str = "cpu") -> float:
    """Best rate of torch.mm over shapes like a block's and a large square one, GFLOP/s."""
    best, device = 0.0, torch.device(device)
    shapes = CPU_SHAPES if device.type == "cpu" else CARD_SHAPES
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        b = torch.randn(columns, inner, dtype=dtype, device=device).t()
        torch.mm(a, b)
        stop = time.perf_counter() + seconds / len(shapes)
        while time.perf_counter() < stop:
            wait_for(device)
            start = time.perf_counter()
            torch.mm(a, b)
            wait_for(device)
            best = max(best, 2e-9 * rows * inner * columns / (time.perf_counter() - start))
    return best


def wait_for(device: torch.device) -> None:
    """Wait until a card has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
