"""The rows of `tilewright.kernels.cross_entropy` on a CPU, in the C++ of `cross_entropy_cpu.cpp`: a row and its
gradient travel between memory and the core once, with one exponential a logit.

Plain PyTorch goes over a row five times. A compiler that fuses these passes computes each exponential twice, and keeps
the logits beside their gradient.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from tilewright.kernels.dispatch import demanded
from tilewright.kernels.native import library

_SOURCE = Path(__file__).with_suffix(".cpp")


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Whether the source could be compiled, for the processor's vectors."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" and library(_SOURCE) is not None


def serves(logits: torch.Tensor, softcap: float) -> bool:
    """Whether the rows of `logits` are taken here: on a CPU, where nothing else is demanded."""
    fitting = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and not softcap
    return fitting and not demanded() and is_compiled()


def statistics_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    upstream: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dlogits: torch.Tensor,
) -> torch.Tensor:
    """(rows, 4) float32, as `_plain_statistics` has them; rows that do not count have a logarithm of 0.

    Args:
        logits: (rows, classes), float32 or bfloat16, the classes beside each other.
        targets: (rows,).
        upstream: (rows,) float32, of any stride; None for no gradient.
        dlogits: where the gradient goes, contiguous: like `logits`, which it may be.
    """
    compiled = library(_SOURCE)
    assert compiled is not None
    count, classes = logits.shape
    targets = targets.contiguous()
    statistics = torch.empty(count, 4)
    compiled.tilewright_cross_entropy(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        int(logits.dtype == torch.bfloat16),
        ctypes.c_void_p(targets.data_ptr()),
        ctypes.c_void_p(None if upstream is None else upstream.data_ptr()),
        ctypes.c_int64(0 if upstream is None else upstream.stride(0)),
        ctypes.c_int64(count),
        ctypes.c_int64(classes),
        ctypes.c_int64(ignore_index),
        ctypes.c_float(label_smoothing),
        ctypes.c_float(z_loss),
        ctypes.c_void_p(statistics.data_ptr()),
        ctypes.c_void_p(dlogits.data_ptr()),
        torch.get_num_threads(),
    )
    return statistics
