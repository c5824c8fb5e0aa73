"""Checks of the modules' arguments: what a counterpart in ``torch.nn`` takes and the op does not is refused by name."""

from __future__ import annotations

from typing import Any

import torch


def refuse(module: str, name: str, value: Any, allowed: Any, why: str) -> None:
    """Raise ``ValueError`` unless the argument `name` has the one value that is allowed."""
    if isinstance(value, torch.Tensor):
        raise ValueError(f"{module}: {name} is a tensor; it must be {allowed!r}: {why}")
    if value != allowed:
        raise ValueError(f"{module}: {name} is {value!r}; it must be {allowed!r}: {why}")


def check_width(module: str, name: str, x: torch.Tensor, width: int, what: str) -> None:
    """Raise ``ValueError`` unless the last dimension of `x` is `width`, which is the module's argument `what`."""
    if not x.ndim or x.shape[-1] != width:
        raise ValueError(f"{module}: {name} has shape {tuple(x.shape)}; its last dimension must be {what}, {width}")
