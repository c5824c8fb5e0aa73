"""Tensors that are laid over several processes (DTensor): this process's part, and where it stands in the whole.

Nothing here imports ``torch.distributed`` for plain tensors; whoever made a DTensor has done so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_laid_out(x: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `x` is a DTensor."""
    return hasattr(x, "to_local")


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of `x`: its own memory. Called where no gradient is recorded."""
    return x.to_local() if is_laid_out(x) else x


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of `x`, on every process."""
    return x.full_tensor() if is_laid_out(x) else x


def layout(x: torch.Tensor) -> object:
    """How `x` stands on the processes; None where it is this process's alone."""
    return (x.device_mesh, x.placements) if is_laid_out(x) else None


def first_element(x: torch.Tensor) -> int:
    """The number of this process's first element in the whole, where the first dimension is what is divided.

    Where it is another, parts are numbered one after another, so that no two elements of the whole have one number.
    Copies of one part have the same numbers always.
    """
    if not is_laid_out(x):
        return 0
    from torch.distributed.tensor import Replicate, Shard

    start, length = 0, x.shape[0] if x.ndim else 1
    part, along_rows = 0, True
    coordinates = x.device_mesh.get_coordinate() or [0] * x.device_mesh.ndim
    for placement, processes, coordinate in zip(x.placements, x.device_mesh.shape, coordinates, strict=True):
        if isinstance(placement, Replicate):
            continue
        part = part * processes + coordinate
        along_rows = along_rows and type(placement) is Shard and placement.dim == 0
        # DTensor's division, as of torch.chunk: equal parts, the last ones shorter or empty.
        chunk = -(-length // processes)
        before = min(chunk * coordinate, length)
        start, length = start + before, min(chunk, length - before)
    return start * x.shape[1:].numel() if along_rows else part * x.numel()
