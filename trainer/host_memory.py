"""Host memory in training on CPU: what is in use, what is not taken, and that freed memory serves the next step.

A step frees and takes the same buffers again and again. Small ones are left to glibc's allocator, told to keep what is
freed; large ones go to the allocator of `host_memory.cpp`, which leaves no gaps between them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1

_SOURCE = Path(__file__).with_suffix(".cpp")


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
    pool = _pool() if _installed else None
    return int(info.uordblks + info.hblkhd) + (pool.tilewright_live_bytes() if pool else 0)


_installed = False


def spare_triton() -> None:
    """Keep this process from importing triton, 70 MB of memory, where it runs no kernel of it.

    Inductor imports triton wherever it is installed, for CPUs too. To be called before `tilewright.kernels` is
    imported. Nothing happens where there is a GPU, where triton's interpreter or kernels are asked for, or where triton
    is imported already.
    """
    wanted = os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("TILEWRIGHT_KERNELS") == "triton"
    if "triton" not in sys.modules and not wanted and not torch.cuda.is_available():
        sys.modules["triton"] = cast(types.ModuleType, None)  # which Python takes for a module that is not installed


def keep_freed_memory() -> None:
    """Have memory that is freed on CPU kept for what is allocated next, instead of returned to the system.

    Each page that went back is a page fault and zeros to write when it returns: about a tenth of a small step. Without
    glibc, or without Linux and a C++ compiler (which compiling a model for CPUs takes too), the respective part is left
    as it is.
    """
    global _installed
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # From the heap, whatever their size: a mapping of its own is returned as soon as it is freed.
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    if not _installed and (pool := _pool()) is not None:
        pool.tilewright_install()
        _installed = True


@functools.cache
def _pool() -> ctypes.CDLL | None:
    """`host_memory.cpp`; None where it cannot be compiled."""
    from tilewright.kernels.native import library  # not above: `spare_triton` comes before anything of the kernels

    loaded = library(_SOURCE, uses_torch=True)
    if loaded is not None:
        loaded.tilewright_live_bytes.restype = ctypes.c_size_t
    return loaded
