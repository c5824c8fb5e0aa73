"""Checks of arguments shared by all ops: each failure is a ``ValueError`` that names the argument, what was given and
what is allowed."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_float(op: str, **tensors: torch.Tensor | None) -> None:
    """Each tensor given is of a floating dtype that the op takes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be float32, float16, bfloat16 or float64")


def check_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """`tensor`, where given, has exactly `shape`, which `what` describes in words."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}, {what}")


def check_same(op: str, first: str, x: torch.Tensor, *, dtype: bool = True, **others: torch.Tensor | None) -> None:
    """Every tensor given stands on the device of `x` and, unless told otherwise, has its dtype."""
    device = x.device
    for name, other in others.items():
        if other is None:
            continue
        if other.device != device:
            raise ValueError(f"{op}: {name} is on {other.device} and {first} on {device}; move one to the other")
        if dtype and other.dtype != x.dtype:
            raise ValueError(f"{op}: {name} has dtype {other.dtype} and {first} {x.dtype}; convert one to the other")
