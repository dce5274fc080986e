"""Peak memory of a piece of work within this process, from Linux's own counters."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """How far resident memory rose above where it stood at the start, at its peak, in bytes."""

    bytes: float = float("nan")


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measure the enclosed work; NaN where the system has no such counters."""
    growth = Growth()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed earlier must not hide what is taken now
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
    except OSError:
        yield growth
        return
    yield growth
    growth.bytes = _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024
