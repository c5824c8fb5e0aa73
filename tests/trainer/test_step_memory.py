"""Memory of a step by kind, beside what the tensors that are there add up to."""

import sys

import pytest
import torch
from torch import nn

from tilewright.trainer.parallel.sharding import world
from tilewright.trainer.record.step_memory import StepMemory

MB = 1_000_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")


class Keeping(nn.Module):
    """Keeps 8 MB for its backward pass, and needs 40 MB more in between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.empty(10 * MB).zero_()
        return (x[:, None] * self.weight).exp().sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int = 1) -> None:
    for _ in range(micro_batches):
        model(torch.full((2000,), 0.1)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_what_is_kept_between_forward_and_backward_is_measured_and_what_passes_is_not() -> None:
    with world():
        model = Keeping()
        optimizer = torch.optim.AdamW(model.parameters())
        memory = StepMemory(model, optimizer, None, torch.device("cpu"))
        step(model, optimizer)
        assert memory.of_step(alone=True)["activations"] is None, "a first step compiles"
        step(model, optimizer)
        kinds = memory.of_step(alone=True)
        assert kinds["activations"] == pytest.approx(8 * MB, rel=0.02)
        assert (kinds["parameters"], kinds["gradients"], kinds["whole_weights"]) == (4000, 4000, 0)
        assert kinds["optimizer"] == pytest.approx(8000, abs=8)
        step(model, optimizer)
        assert memory.of_step(alone=False)["activations"] is None, "a checkpoint was being written"


def test_gradients_that_wait_in_full_are_counted_and_evaluation_is_not() -> None:
    with world():
        model = Keeping()
        optimizer = torch.optim.SGD(model.parameters())
        memory = StepMemory(model, optimizer, None, torch.device("cpu"))
        memory.of_step(alone=True)
        waiting = []
        model.weight.register_hook(lambda gradient: waiting.append(torch.zeros(MB)))
        with torch.no_grad():
            model(torch.ones(4000))
        kept = torch.zeros(MB)
        step(model, optimizer, micro_batches=3)
        kinds = memory.of_step(alone=True)
        assert kinds["gradients"] == pytest.approx(2 * 4 * MB, rel=0.02)
        assert kinds["activations"] == pytest.approx(8 * MB, rel=0.02)
        assert len(kept) == MB
        waiting.clear()
        step(model, optimizer)
        assert memory.of_step(alone=True)["gradients"] == 4000
