"""Host memory as glibc's allocator has it: what is in use, and that freed memory is kept for the next step on CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import cast

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _mallinfo() -> Callable[[], _MallocInfo] | None:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = _MallocInfo, []
    return cast(Callable[[], _MallocInfo], function)


def allocated_bytes() -> int | None:
    """Bytes that this process has allocated and not freed, of all threads; None where the C library is not glibc."""
    ask = _mallinfo()
    if ask is None:
        return None
    info = ask()
    return int(info.uordblks + info.hblkhd)


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
