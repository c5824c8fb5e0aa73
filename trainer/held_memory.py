"""What a process holds of a model between steps, by kind: its shards of parameters, gradients and optimizer state."""

from __future__ import annotations

import torch
from torch import nn

from tilewright.kernels.shards import local


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process's ``parameters``, ``gradients`` (as a step makes them, of the parameters' dtype) and
    ``optimizer`` state."""
    parameters = sum(local_bytes(p) for p in model.parameters())
    state = sum(local_bytes(x) for kept in optimizer.state.values() for x in kept.values() if torch.is_tensor(x))
    return {"parameters": parameters, "gradients": parameters, "optimizer": state}


def local_bytes(x: torch.Tensor) -> int:
    """Bytes of this process's part of a tensor."""
    mine = local(x)
    return mine.numel() * mine.element_size()
