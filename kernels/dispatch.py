"""Which implementation runs: one function, `choose`, and the two ways to override it.

- On a CUDA device the Triton kernels run.
- On CPU the plain PyTorch reference runs, which Inductor can fuse with its neighbours; an opaque kernel would not be.
  Where there is nothing to fuse, some of it is C++ (the `*_cpu.py` of this folder): packed attention in bfloat16, the
  rows of a loss, AdamW's mixed dtypes. Without a C++ compiler, and where the reference is demanded, all is PyTorch.
- ``tilewright.kernels.use("triton" | "reference" | "auto")`` overrides the choice within a ``with`` block,
  the environment variable ``TILEWRIGHT_KERNELS`` for a whole process.

Triton kernels run on CPU tensors only in Triton's interpreter (``TRITON_INTERPRET=1``, set before the import).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tilewright.kernels.launch import ahead_of_time

MODES = ("auto", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined, so its value at import is the one that counts.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """The implementation that serves a call, and why."""

    implementation: str
    reason: str


# Made once: a choice is made on every call of every op.
_ON_CUDA = Choice("triton", "on a CUDA device")
_OFF_CUDA = Choice("reference", "off CUDA, plain PyTorch, which Inductor can fuse")
_ON_META = Choice("reference", "on the meta device, where there are shapes and nothing to compute")
_WITHOUT_TRITON = Choice("reference", "triton is not installed")
_OTHER_DTYPE = Choice("reference", "the Triton kernels take float32, float16 and bfloat16 only")
_DEMANDED_TRITON = Choice("triton", "demanded by use() or TILEWRIGHT_KERNELS")
_DEMANDED_REFERENCE = Choice("reference", "demanded by use() or TILEWRIGHT_KERNELS")

_mode = os.environ.get("TILEWRIGHT_KERNELS", "auto")


@contextmanager
def use(mode: str) -> Iterator[None]:
    """Override which implementation runs inside the ``with`` block, for all ops and threads of this process.

    Args:
        mode: ``"triton"``, ``"reference"`` or ``"auto"``.

    Raises:
        ValueError: the mode is none of the three.
    """
    if mode not in MODES:
        raise ValueError(f"use: mode is {mode!r}; it must be one of {', '.join(MODES)}")
    global _mode
    previous, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = previous


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation that an op would use for tensors on `device` of type `dtype`, with the reason.

    Raises:
        ValueError: Triton is demanded where it cannot run, TILEWRIGHT_KERNELS names no mode, or device is none.
    """
    if not isinstance(device, torch.device):
        raise ValueError(f"choose: device is {device!r}; it must be a torch.device")
    kind = device.type
    if kind == "meta":  # shapes alone, whatever is demanded
        return _ON_META
    if _mode == "auto":
        if kind != "cuda":
            return _OFF_CUDA
        if not HAS_TRITON:
            return _WITHOUT_TRITON
        return _ON_CUDA if dtype in TRITON_DTYPES else _OTHER_DTYPE
    if _mode == "reference":
        return _DEMANDED_REFERENCE
    if _mode != "triton":
        raise ValueError(f"TILEWRIGHT_KERNELS is {_mode!r} in the environment; it must be one of {', '.join(MODES)}")
    if not HAS_TRITON:
        raise ValueError("the Triton kernels are demanded, but triton is not installed: pip install triton")
    if kind == "cpu" and not INTERPRETED and not ahead_of_time():
        raise ValueError(
            "the Triton kernels are demanded for CPU tensors, which they take only in Triton's interpreter: "
            "set TRITON_INTERPRET=1 before Python starts, or use('auto')"
        )
    if dtype not in TRITON_DTYPES:
        raise ValueError(
            f"the Triton kernels take float32, float16 and bfloat16, not {dtype}: convert, or use('reference')"
        )
    return _DEMANDED_TRITON


def demanded() -> bool:
    """Whether use() or TILEWRIGHT_KERNELS names an implementation, so that nothing else may be chosen."""
    return _mode != "auto"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels serve a call whose tensors are like `x`."""
    return choose(x.device, x.dtype).implementation == "triton"
