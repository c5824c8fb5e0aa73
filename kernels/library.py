"""Registration of launches with ``torch.library``, so that autograd, ``torch.compile``, FakeTensor and selective
activation checkpointing see each op as one node.

The low-level ``Library`` is used rather than ``torch.library.custom_op``: it skips the Python wrapper that the latter
puts around every eager call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("tilewright", "DEF")


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register ``tilewright::NAME`` with its launch (CUDA, and CPU for the interpreter) and its shape function.

    Args:
        schema: ``"name(Tensor x, …) -> Tensor"``, without the namespace.
        launch: allocates the outputs and launches the kernels.
        fake: the outputs' shapes, dtypes and strides, with no computation.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CUDA")
    _LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.tilewright, name).default
    return overload


def differentiate(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give `op` its backward formula."""
    torch.library.register_autograd(op._name, backward, setup_context=setup_context, lib=_LIBRARY)


def refuse_double_backward(op: torch._ops.OpOverload) -> None:
    """Make the gradient of `op`, itself a backward pass, an error; without this it would silently be missing."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op._name} is a backward pass and has no gradient of its own; for second derivatives compute the "
            "same from plain PyTorch operations"
        )

    differentiate(op, backward)
