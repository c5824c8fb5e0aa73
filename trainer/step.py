"""The mathematics of one optimizer step, apart from the loop around it.

    loss = Σ over the step's valid tokens, of all micro-batches and processes, of −log p(token)  ÷  their count

The count is known before the first backward pass, so accumulation, uneven documents and the number of processes change
neither the loss nor its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tilewright.corpus import IGNORE, Batch
from tilewright.model import Transformer
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel import World


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, on the device: see `Transformer.forward`."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, across_documents: bool) -> MicroBatch:
        """The arrays of a `Batch` as tensors; `across_documents` drops its document boundaries."""
        segments = None if across_documents else torch.from_numpy(batch.cu_seqlens).to(device)
        return cls(torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.targets).to(device), segments)

    def valid_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats a token) over the whole step, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    world: World,
    *,
    max_grad_norm: float,
) -> StepResult:
    """Forward and backward over this process's micro-batches, then one optimizer step.

    Args:
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.

    Raises:
        TrainingError: a gradient is not finite; no weight has changed.
    """
    assert isinstance(model, FSDPModule)
    (valid_tokens,) = world.sum(sum(micro.valid_tokens() for micro in micro_batches))
    # FSDP averages gradients over the processes; the factor makes a sum of it again.
    scale = world.size / max(valid_tokens, 1.0)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, micro in enumerate(micro_batches):
        # Gradients are reduced once a step; until then each process adds up its own, in float32.
        model.set_requires_gradient_sync(number == len(micro_batches) - 1)
        summed = model(micro.inputs, micro.targets, micro.cu_seqlens)
        (summed * scale).backward()
        total += summed.detach()
    grad_norm = clip_gradients(model, max_grad_norm)
    if not math.isfinite(grad_norm):
        # The norm is over all processes, so all of them end here, before the weights are touched.
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"training diverged: the gradient's norm is {grad_norm}; the checkpoints are untouched; start another run "
            "with a lower optimizer.learning_rate or a longer schedule.warmup_steps"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    (loss,) = world.sum(total.item())
    return StepResult(loss / max(valid_tokens, 1.0), grad_norm)


def clip_gradients(model: Transformer, max_norm: float) -> float:
    """Scale the gradients down to a global norm of `max_norm` (0: leave them); returns the norm they had."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # over all shards, not this process's
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
