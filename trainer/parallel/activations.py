"""Activation checkpointing (arXiv:1604.06174): what a block keeps for its backward pass, and what is computed again.

Selective checkpointing keeps the results that are dear to compute, matrix products and attention; what lies between
them (norms, rotary, SwiGLU) is computed again. In a compiled block the compiler fuses it with its use: memory that is
read twice costs more than the arithmetic (arXiv:2205.05198).

A block's forward is wrapped inside the module, so the weights that FSDP gathered for the backward pass serve the
recomputation too: no mode gathers more often than another.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tilewright.kernels.registry import SPECS
from tilewright.model.config import ModelConfig
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.recipe import ActivationCheckpointing

_MATMULS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm"))


def checkpoint_activations(
    blocks: Iterable[nn.Module], recipe: ActivationCheckpointing, *, compiled: bool, device_type: str
) -> None:
    """Have `blocks` keep what the recipe says; called before they are compiled or sharded.

    Args:
        compiled: whether the blocks will be compiled.
        device_type: where they will run, ``cpu`` or ``cuda``.

    Raises:
        TrainingError: `keep` names what is no kernel.
    """
    mode = _mode(recipe, compiled, device_type)
    # The compiler's own setting, which concerns every graph that this process compiles from here on.
    torch._functorch.config.activation_memory_budget = recipe.budget if mode == "budget" else 1.0
    if mode == "full":
        for block in blocks:
            _wrap(block, None)
    elif mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy(recipe.keep))
        for block in blocks:
            _wrap(block, contexts)


def recomputed_flops_per_token(
    recipe: ActivationCheckpointing,
    config: ModelConfig,
    sequence_length: int,
    *,
    compiled: bool,
    device_type: str,
) -> int | None:
    """Floating-point operations that the backward pass spends on each token to compute activations again.

    Counted as in `ModelConfig.flops_per_token`: matrix products and attention, the causal mask not deducted. A block
    that is computed again stops short of its last matrix product, whose result no gradient needs; where attention is
    kept, the rest is still computed. What a kernel computes twice within itself is its own affair and counts once.

    Args:
        compiled, device_type: as for `checkpoint_activations`.

    Returns:
        None in mode ``budget``, where the compiler chooses and does not tell.
    """
    mode = _mode(recipe, compiled, device_type)
    if mode == "none" or (mode == "budget" and recipe.budget >= 1):
        return 0
    if mode == "budget":
        return None
    last = config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    matmul = 2 * (config.matmul_parameters() - head - config.layers * last)
    attention = 4 * config.layers * config.heads * config.head_dim * sequence_length
    kept = recipe.keep if mode == "selective" else []
    return matmul * ("matmul" not in kept) + attention * ("attention" not in kept)


def _mode(recipe: ActivationCheckpointing, compiled: bool, device_type: str) -> str:
    """The mode, with ``auto`` made up."""
    if recipe.mode != "auto":
        return recipe.mode
    # On a GPU no one has seen yet what the compiler then makes of the Triton ops.
    return "selective" if compiled and device_type == "cpu" else "none"


def _wrap(block: nn.Module, contexts: Callable[[], Any] | None) -> None:
    forward: Callable[..., Any] = block.forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws random numbers
    if contexts is not None:
        options["context_fn"] = contexts
        # PyTorch asks everyone to make sure that nothing is changed in place, which no block does.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_says_something_else)

    def recomputing(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, **options)

    block.forward = recomputing


def _says_something_else(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _policy(keep: Sequence[str]) -> Callable[..., CheckpointPolicy]:
    """The policy that keeps the results of the ops named `keep`."""
    known = ["matmul", *(spec.name for spec in SPECS)]
    for name in keep:
        if name not in known:
            raise TrainingError(
                f"activation_checkpointing.keep names {name!r}, which is no op; it may name {', '.join(known)}"
            )
    names = [name for name in keep if name != "matmul"]

    def policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        kept = ("matmul" in keep and op in _MATMULS) or any(name in str(op) for name in names)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
