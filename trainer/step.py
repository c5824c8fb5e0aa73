"""The mathematics of one optimizer step, apart from the loop around it.

    loss = Σ over the step's valid tokens, of all micro-batches and processes, of −log p(token)  ÷  their count

The count is known before the first backward pass, so accumulation, uneven documents and the number of processes change
neither the loss nor its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tilewright.corpus import IGNORE, Batch
from tilewright.kernels.shards import local
from tilewright.model import Transformer
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.parallel.waiting import reduction_marks
from tilewright.trainer.record.phases import PhaseClock


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, on the device: see `Transformer.forward`.

    Attributes:
        valid: targets that count, where they were counted before they went to the device.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    valid: int | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, across_documents: bool, length: int | None = None) -> MicroBatch:
        """The arrays of a `Batch` as tensors.

        Args:
            across_documents: drop its document boundaries.
            length: cut its rows into pieces of so many tokens, which do not see each other; divides theirs.
        """
        starts = [] if across_documents else [batch.cu_seqlens]
        if length is not None and length < batch.inputs.shape[1]:
            starts.append(np.arange(0, batch.inputs.size + 1, length, dtype=np.int32))
        segments = torch.from_numpy(np.unique(np.concatenate(starts))).to(device) if starts else None
        inputs, targets = (torch.from_numpy(x).to(device) for x in (batch.inputs, batch.targets))
        return cls(inputs, targets, segments, valid=int((batch.targets != IGNORE).sum()))

    def valid_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum()) if self.valid is None else self.valid


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        loss: mean over the whole step, nats a token.
        grad_norm: of the gradient before clipping.
        stepped: whether the weights changed: not where the gradient is not finite, or the loss beyond its limit.
        overflowed: whether they did not for the loss scale alone, which was too large and now is smaller.
        micro_losses: this process's micro-batches' summed losses, in nats, on the device.
        grad_norms: `grad_norm` by place, see `place_of`.
        seconds: of ``forward``, ``backward``, ``reduce`` and ``optimizer``, in this process; see `PhaseClock`.
    """

    loss: float
    grad_norm: float
    stepped: bool
    overflowed: bool
    micro_losses: list[torch.Tensor] = field(compare=False)
    grad_norms: dict[str, float]
    seconds: dict[str, float] = field(compare=False)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    world: World,
    *,
    max_grad_norm: float,
    reduce_every: bool = False,
    loss_limit: float = math.inf,
    loss_scale: LossScale | None = None,
) -> StepResult:
    """Forward and backward over this process's micro-batches, then one optimizer step.

    A step whose gradient is not finite, or whose loss is above `loss_limit`, leaves weights and optimizer as they were.
    All processes come to this from the same sums, on the device: none waits for it before the optimizer has run.

    Args:
        max_grad_norm: gradients are scaled down to this global norm; 0 leaves them.
        reduce_every: reduce gradients over the shards after each micro-batch, not only after the last.
        loss_limit: of the mean loss, in nats a token.
        loss_scale: for float16; updated.
    """
    assert isinstance(model, FSDPModule)
    (valid_tokens,) = world.sum(sum(micro.valid_tokens() for micro in micro_batches))
    # FSDP averages gradients over the processes; the factor makes a sum of it again.
    scale = world.size / max(valid_tokens, 1.0)
    losses, clock = [], PhaseClock(world.device)
    for number, micro in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        # Until gradients are reduced, each process adds up its own, in float32.
        model.set_requires_gradient_sync(last or reduce_every)
        model.set_requires_all_reduce(last)
        clock.begin("forward")
        summed = model(micro.inputs, micro.targets, micro.cu_seqlens)
        clock.begin("backward")
        (summed * (scale if loss_scale is None else scale * loss_scale.scale)).backward()
        clock.insert(reduction_marks("backward", "reduce"))
        losses.append(summed.detach())
    clock.begin("optimizer")
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]
    if loss_scale is not None:
        for _, parameter in parameters:
            assert parameter.grad is not None
            gradient = local(parameter.grad)
            gradient.div_(loss_scale.scale.to(gradient.device))  # the host's, where weights are offloaded
    places, squares = _squares(parameters, world.device)
    sums = world.add(torch.cat([torch.stack(losses).double().sum()[None], squares]))
    loss, norm = sums[0] / max(valid_tokens, 1.0), sums[1:].sum().sqrt()
    good = norm.isfinite() & (loss <= loss_limit)
    # As `torch.nn.utils.clip_grad_norm_` has it.
    excess = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0).float() if max_grad_norm > 0 else None
    _step_if(good, optimizer, excess)
    optimizer.zero_grad(set_to_none=True)
    overflowed = torch.zeros_like(good)
    if loss_scale is not None:
        overflowed = ~norm.isfinite() & loss.isfinite() & (loss_scale.scale > 1.0)
        loss_scale.update(norm.isfinite())
    figures = torch.stack([loss, norm, good.double(), overflowed.double()])
    mean, whole, stepped, too_large, *norms = torch.cat([figures, sums[1:].sqrt()]).tolist()
    grad_norms = dict(zip(places, norms, strict=True))
    return StepResult(mean, whole, bool(stepped), bool(too_large), losses, grad_norms, clock.seconds())


def place_of(name: str) -> str:
    """Where a parameter is: its block, such as ``blocks.3``, or the module that is in none, such as ``embedding``."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


def _squares(parameters: Sequence[tuple[str, torch.Tensor]], device: torch.device) -> tuple[list[str], torch.Tensor]:
    """Places, and this process's part of the gradients' squared norm at each (places,), in float64: the parts of all
    processes add up to the whole.

    An element that several processes hold, each a replica of it, counts once over all of them.
    """
    places = list(dict.fromkeys(place_of(name) for name, _ in parameters))
    squares = torch.zeros(len(places), dtype=torch.float64, device=device)
    if not parameters:
        return places, squares
    gradients = [parameter.grad for _, parameter in parameters]
    shards = [local(grad) for grad in gradients if grad is not None]
    where = torch.tensor([places.index(place_of(name)) for name, _ in parameters], device=device)
    squares.index_add_(0, where, torch.stack(torch._foreach_norm(shards)).to(device).double().square())
    first = parameters[0][1]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        squares /= math.prod(mesh.size(i) for i, place in enumerate(first.placements) if place.is_replicate())
    return places, squares


def _step_if(good: torch.Tensor, optimizer: torch.optim.Optimizer, excess: torch.Tensor | None) -> None:
    """Step where `good` holds, with the gradients divided by `excess`.

    An optimizer made for a gradient scaler finds out the first on the device, and does the second as it reads them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device  # the host's, where weights are offloaded
    excess = None if excess is None else excess.to(device)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if good.item():
            if excess is not None:
                torch._foreach_div_([local(p.grad) for p in parameters if p.grad is not None], excess)
            optimizer.step()
        return
    optimizer.grad_scale = excess  # type: ignore[attr-defined]
    optimizer.found_inf = (~good).float().to(device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
