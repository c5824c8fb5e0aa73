"""Checks of arguments shared by all ops: each failure is a ``ValueError`` that names the argument, what was given and
what is allowed."""

from __future__ import annotations

import itertools
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NUMBERS = (int, float)


def is_number(value: Any) -> bool:
    """Whether an option is a Python number, below 2⁶³ in size and so neither infinite nor NaN."""
    if type(value) is float:  # the usual case, and quickly
        return -(2.0**63) < value < 2.0**63
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and -(2.0**63) < value < 2.0**63


def is_whole(value: Any) -> bool:
    """Whether an option is an integer of Python, or of a graph being traced, that fits 64 bits."""
    return isinstance(value, torch.SymInt) or (isinstance(value, int) and is_number(value))


def check_tensors(op: str, **tensors: Any) -> None:
    """Each is a dense tensor; None is none."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{op}: {name} is of type {type(tensor).__name__}; it must be a tensor")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{op}: {name} has layout {tensor.layout}; it must be dense (torch.strided)")


def check_float(op: str, **tensors: torch.Tensor | None) -> None:
    """Each that is given is a dense tensor of a floating dtype that the op takes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            check_tensors(op, **{name: tensor})
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be float32, float16, bfloat16 or float64")


def check_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """`tensor`, where given, has exactly `shape`, which `what` describes in words."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {what}")


def check_same(op: str, first: str, x: torch.Tensor, *, dtype: bool = True, **others: torch.Tensor | None) -> None:
    """Every tensor given stands on the device of `x` and, unless told otherwise, has its dtype."""
    for name, other in others.items():
        if other is None:
            continue
        if other.device != x.device:
            raise ValueError(f"{op}: {name} is on {other.device} and {first} on {x.device}; move one to the other")
        if dtype and other.dtype is not x.dtype:
            raise ValueError(f"{op}: {name} has dtype {other.dtype} and {first} {x.dtype}; convert one to the other")


def check_starts(op: str, cu_seqlens: torch.Tensor, tokens: int) -> None:
    """`cu_seqlens` rises from 0 to all tokens; reads its values."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != tokens or any(start > end for start, end in itertools.pairwise(starts)):
        raise ValueError(
            f"{op}: cu_seqlens goes from {starts[0]} to {starts[-1]}; it must rise from 0 to the {tokens} tokens of q "
            "and never fall"
        )
