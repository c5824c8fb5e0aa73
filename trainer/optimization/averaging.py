"""An exponential moving average of the weights, which smooths what a learning rate that has not decayed makes of them.

    a_t = Σ_{s=1…t} (1 − d) dᵗ⁻ˢ w_s ÷ (1 − dᵗ)        w_s: the weights after step s; d: the decay

The division makes the coefficients add up to 1, so that the initial weights have no part in it, as in Adam's averages
(arXiv:1412.6980). The same, step by step: a_t = a_{t−1} + (1 − d) / (1 − dᵗ) · (w_t − a_{t−1}). Where a run begins to
keep it after some steps, the weights after the last of these stand for those after all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tilewright.kernels.shards import local

AVERAGE = "average."


def averaged_state(averages: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Averages by their parameters' names as a checkpoint has them: ``average.NAME``."""
    return {AVERAGE + name: average for name, average in averages.items()}


class WeightAverage:
    """The average of a model's parameters, in float32 and sharded as they are: 4 bytes × parameters ÷ shards.

    Args:
        model: its parameters stand where they are trained.
        decay: d, between 0 and 1; the average reaches back over about 1 / (1 − d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def begin(self) -> None:
        """Take the weights as they are for the average so far."""
        for average, parameter in self._pairs():
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after step `step`, counted from 1."""
        weight = (1 - self._decay) / (1 - self._decay**step)
        for average, parameter in self._pairs():
            average.lerp_(parameter.float(), weight)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint by name."""
        return averaged_state(self._averages)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Within the ``with`` block the model has the averages for its weights; these are kept beside it meanwhile.

        The model is sharded on the way in and out, as a step and `evaluate` leave it: what is gathered is not changed.
        """
        with torch.no_grad():
            kept = [parameter.clone() for _, parameter in self._pairs()]
            for average, parameter in self._pairs():
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), weight in zip(self._pairs(), kept, strict=True):
                    parameter.copy_(weight)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's part of each average and of its parameter."""
        for name, parameter in self._parameters.items():
            yield local(self._averages[name]), local(parameter)
