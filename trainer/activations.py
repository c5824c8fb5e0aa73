"""What a compiled block keeps for its backward pass.

Kept are the results of matrix products and of attention, which are dear to compute. What lies between them (norms,
rotary, SwiGLU) is computed again in the backward pass, where the compiler fuses it with its use: memory that is read
twice costs more than the arithmetic (selective activation checkpointing, arXiv:2205.05198).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def keep_products_only(block: nn.Module) -> None:
    """Have `block`, once compiled, keep these results only; run eagerly it keeps what autograd keeps."""
    forward: Callable[..., Any] = block.forward

    def recomputing(*inputs: Any) -> Any:
        # Eagerly each op would pass through a dispatch mode in Python.
        if not torch.compiler.is_compiling():
            return forward(*inputs)
        return checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_selective_contexts
        )

    block.forward = recomputing
    # PyTorch asks everyone to make sure that nothing is changed in place, which no block does.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_says_something_else)


def _says_something_else(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = op in _PRODUCTS or "attention" in str(op)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
