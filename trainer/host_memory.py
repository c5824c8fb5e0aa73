"""How freed host memory is kept for the next step of a run on CPU."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc's allocator keep what is freed instead of returning it to the system.

    A training step frees and takes the same buffers again and again. Each page that went back is a page fault and zeros
    to write when it returns: about a tenth of a small step. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # From the heap, whatever their size: a mapping of its own is returned as soon as it is freed.
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
