"""Dynamic loss scaling for float16, whose smallest numbers most gradients would fall below (arXiv:1710.03740).

The loss is multiplied by a scale before the backward pass and the gradients divided by it after. A gradient that
overflows makes its step be skipped and the scale halve; so many good steps in a row double it. The decision follows
from sums over all processes, so their scales stay the same with no further word.
"""

from __future__ import annotations

import torch

_FIRST, _LEAST, _MOST = 2.0**16, 1.0, 2.0**24
_GROWS_AFTER = 2000


class LossScale:
    """The scale, and how many good steps it has seen since it last changed; both are tensors on `device`.

    Attributes:
        scale: float32, no dimension.
        good_steps: int64, no dimension.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(_FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint by name."""
        return {"loss_scale.scale": self.scale, "loss_scale.good_steps": self.good_steps}

    def update(self, finite: torch.Tensor) -> None:
        """After a step whose gradient was `finite` (bool, no dimension) or not, without waiting for the device."""
        good = torch.where(finite, self.good_steps + 1, 0)
        grows = good >= _GROWS_AFTER
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.scale.copy_((self.scale * factor).clamp_(_LEAST, _MOST))
        self.good_steps.copy_(torch.where(grows, 0, good))
