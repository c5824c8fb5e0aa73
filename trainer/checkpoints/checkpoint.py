"""Checkpoints: written with DCP, committed by a marker that comes last, verified before they are read.

A checkpoint is a folder ``step-00000100``, in the run directory's ``checkpoints`` or wherever ``checkpoints.folder``
says, that holds one file of tensors a process, DCP's ``.metadata``, and ``COMMITTED.json``, which names every file with
its size and SHA-256. It counts only once the marker is in place, which comes there whole, by an atomic rename or as one
object, after everything else is stored, so a run killed at any instant finds its last committed checkpoint whole. It
holds tensors alone, and reading it runs no code from it: tensors are read with ``weights_only``, and the metadata,
which DCP pickles, by an unpickler that knows the few classes that belong there.
"""

from __future__ import annotations

import torch
from torch import nn

from tilewright.trainer.checkpoints.files import MARKER, Committed, checkpoint_folder, checkpoint_of, committed
from tilewright.trainer.checkpoints.reader import load, seen_by_the_first
from tilewright.trainer.checkpoints.writer import CheckpointWriter

__all__ = [
    "MARKER",
    "CheckpointWriter",
    "Committed",
    "checkpoint_folder",
    "checkpoint_of",
    "committed",
    "load",
    "seen_by_the_first",
    "training_state",
]


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: ``model.NAME`` and, with an optimizer, ``optimizer.NAME.STATE``."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, torch.Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
    if optimizer is not None:
        for parameter, tensors in optimizer.state.items():
            state.update({f"optimizer.{names[parameter]}.{key}": value for key, value in tensors.items()})
    return state
