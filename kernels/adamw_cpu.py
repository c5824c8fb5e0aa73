"""The step of `tilewright.kernels.adamw` on a CPU where not all is float32: one pass over each element, on the threads
that PyTorch has, in the C++ of `adamw_cpu.cpp`. Results equal those of the reference to the bit, but for its square
roots: PyTorch's are often the neighbour of the nearest number.

PyTorch's own fused kernel, which steps the others, wants parameter, gradient and state in one dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewright.kernels.adamw import Rule, Slot
from tilewright.kernels.dispatch import demanded
from tilewright.kernels.native import library

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = (torch.float32, torch.bfloat16)


class _Tensor(ctypes.Structure):
    """``struct Tensor`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "exp_avg", "exp_avg_sq", "low_bits", "grad")),
        *((name, ctypes.c_int64) for name in ("numel", "number", "first", "step", "narrow")),
        *((name, ctypes.c_float) for name in ("root", "step_size")),
    ]


class _Rule(ctypes.Structure):
    """``struct Rule`` of the source."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("scale", "rest1", "rest2", "eps", "decay")),
        ("stochastic", ctypes.c_int32),
        ("seed", ctypes.c_int64),
    ]


def is_compiled() -> bool:
    """Whether the source could be compiled."""
    return _compiled() is not None


def serves(slot: Slot, grad: torch.Tensor) -> bool:
    """Whether this is to step it: on a CPU, in float32 and bfloat16, where the source could be compiled and nothing
    else is demanded."""
    fitting = all(x.dtype in _DTYPES for x in (slot.param, grad, slot.exp_avg, slot.exp_avg_sq))
    return slot.param.device.type == "cpu" and fitting and not demanded() and is_compiled()


def step(members: Sequence[tuple[Slot, torch.Tensor]], rule: Rule) -> None:
    """Step what `serves` holds for, in place.

    Args:
        members: each a slot, whose step counts this one already, and its gradient in the slot's order of memory.
        rule: with a number as `lr`.
    """
    compiled = _compiled()
    assert compiled is not None
    lr = float(rule.lr)
    rows = []
    for slot, grad in members:
        t = int(slot.step)
        kinds = (slot.param, grad, slot.exp_avg, slot.exp_avg_sq)
        rows.append(
            _Tensor(
                param=slot.param.data_ptr(),
                exp_avg=slot.exp_avg.data_ptr(),
                exp_avg_sq=slot.exp_avg_sq.data_ptr(),
                low_bits=None if slot.low_bits is None else slot.low_bits.data_ptr(),
                grad=grad.data_ptr(),
                numel=slot.param.numel(),
                number=slot.number,
                first=slot.first,
                step=t,
                narrow=sum(1 << place for place, x in enumerate(kinds) if x.dtype == torch.bfloat16),
                root=(1.0 - rule.beta2**t) ** -0.5,
                step_size=lr / (1.0 - rule.beta1**t),
            )
        )
    numbers = _Rule(
        scale=rule.scale,
        rest1=1.0 - rule.beta1,
        rest2=1.0 - rule.beta2,
        eps=rule.eps,
        decay=lr * rule.weight_decay,
        stochastic=rule.stochastic,
        seed=rule.seed,
    )
    table = (_Tensor * len(rows))(*rows)
    compiled.tilewright_adamw(table, ctypes.c_int64(len(rows)), ctypes.byref(numbers), torch.get_num_threads())


def _compiled() -> ctypes.CDLL | None:
    # Products and sums rounded one by one, as PyTorch's are.
    return library(_SOURCE, "-ffp-contract=off")
