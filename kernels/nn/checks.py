"""Checks of the modules' arguments: what a counterpart in ``torch.nn`` takes and the op does not is refused by name."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.checks import check_float, check_tensors, is_whole


def refuse(module: str, name: str, value: Any, allowed: Any, why: str) -> None:
    """Raise ``ValueError`` unless the argument `name` has the one value that is allowed."""
    if isinstance(value, torch.Tensor):
        raise ValueError(f"{module}: {name} is a tensor; it must be {allowed!r}: {why}")
    if value != allowed:
        raise ValueError(f"{module}: {name} is {value!r}; it must be {allowed!r}: {why}")


def check_size(module: str, name: str, value: Any) -> None:
    """Raise ``ValueError`` unless the argument `name` is a size: an integer, at least 1."""
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{module}: {name} is {value!r}; it must be at least 1, an integer")


def check_width(module: str, name: str, x: torch.Tensor, width: int, what: str) -> None:
    """Raise ``ValueError`` unless the last dimension of `x` is `width`, which is the module's argument `what`."""
    check_tensors(module, **{name: x})
    check_float(module, **{name: x})
    if not x.ndim or x.shape[-1] != width:
        raise ValueError(f"{module}: {name} has shape {tuple(x.shape)}; its last dimension must be {what}, {width}")
