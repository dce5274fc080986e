"""How the process gets memory from the system."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_LARGE = 32 << 20
"""Bytes: larger blocks still go back at once; glibc allows no more."""
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Keep up to 1 GB of freed memory for the next matrices, where the C library is glibc; elsewhere do nothing.

    By itself it gives freed blocks back to the system soon. The activations and logits of the next piece of work, as
    large, would then be mapped and cleared page by page again.

    Returns:
        Whether the C library took the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be opened so
        return False
    return all((mallopt(_MMAP_THRESHOLD, _LARGE), mallopt(_TRIM_THRESHOLD, _KEPT)))
