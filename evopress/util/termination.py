"""Stop at a good moment when the cluster says so."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], None]]:
    """Yield a function to call between pieces of work: it raises SystemExit(143) once SIGTERM has come.

    The signal only sets a flag, so no write is cut short. Outside of the main thread signals cannot be caught, and the
    function does nothing.
    """
    received = threading.Event()

    def check() -> None:
        if received.is_set():
            raise SystemExit(EXIT_CODE)

    def handle(signum: int, frame: FrameType | None) -> None:
        received.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)
