"""What a process has in memory during a step, by kind, measured at the cost of asking the allocator twice a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tilewright.kernels.shards import local
from tilewright.trainer.held_memory import held_bytes, local_bytes
from tilewright.trainer.host_memory import allocated_bytes
from tilewright.trainer.optimization.averaging import WeightAverage


class StepMemory:
    """Follows the memory of each step of this process, on its GPU or, with glibc, on its CPU.

    The kinds, in bytes:

    - ``parameters``, ``optimizer``, ``average`` (with ``optimizer.ema_decay``): its shards, held all the time;
    - ``gradients``: its shards as the optimizer takes them, or what has grown from the first micro-batch's forward pass
      to the last one's where that is more: whole gradients that wait for the reduction;
    - ``whole_weights``: what FSDP has gathered when the first forward pass ends;
    - ``activations``: what that pass has allocated and not freed at its end, whole weights not counted: what autograd
      keeps for the backward pass. What ops need for themselves comes and goes in between and is in
      ``peak_memory_bytes`` alone.

    Args:
        model: sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        device: torch.device,
    ) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._held = held_bytes(model, optimizer)
        if average is not None:
            self._held["average"] = sum(local_bytes(x) for x in average.state().values())
        self._shards = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
        self._whole_weights: int | None = None
        self._start: int | None = None  # of the step: in use before its first forward pass
        self._grown = 0
        self._activations: int | None = None
        self._settled = False
        # First and last of all hooks, so that what FSDP gathers is counted.
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.register_forward_hook(self._after_forward)

    def of_step(self, *, alone: bool) -> dict[str, int | None]:
        """The kinds of the step that has ended; None for what is not known.

        Args:
            alone: whether nothing else, such as a checkpoint that is being written or the profiler, allocated
                meanwhile. On a CPU, where that cannot be told apart, ``activations`` are None otherwise, as they are in
                a process's first step, in which code is compiled.
        """
        if not self._held["optimizer"] and self._optimizer.state:
            self._held |= held_bytes(self._model, self._optimizer)
        known = self._device.type == "cuda" or (alone and self._settled)
        measured: dict[str, int | None] = {
            "gradients": max(self._held["gradients"], self._grown if known else 0),
            "whole_weights": self._whole_weights,
            "activations": self._activations if known else None,
        }
        self._start, self._grown, self._activations, self._settled = None, 0, None, True
        return {**self._held, **measured}

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        now = self._allocated()
        if self._start is None:
            self._start = now
        elif now is not None:
            self._grown = now - self._start

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or self._start is None or self._activations is not None:
            return
        now = self._allocated()
        if self._whole_weights is None:
            gathered = [p for p in module.parameters() if not isinstance(p, DTensor)]
            self._whole_weights = sum(p.nbytes for p in gathered if p.untyped_storage().data_ptr() not in self._shards)
        if now is not None:
            self._activations = max(0, now - self._start - self._whole_weights)

    def _allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else allocated_bytes()
