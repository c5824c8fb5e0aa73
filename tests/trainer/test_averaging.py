"""The average of the weights, against the sum that defines it."""

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tilewright.model import Transformer, from_preset
from tilewright.trainer.optimization.averaging import WeightAverage
from tilewright.trainer.parallel.sharding import World, sharded_model, world

CONFIG = from_preset(
    "llama-10m", vocab_size=30, hidden_size=16, layers=1, heads=2, kv_heads=2, head_dim=8, intermediate_size=24,
    max_sequence_length=8,
)  # fmt: skip
NAME = "blocks.0.mlp.down.weight"


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def sharded(processes: World, dtype: torch.dtype = torch.float32) -> Transformer:
    return sharded_model(CONFIG, processes, compute_dtype=dtype, compile=False, seed=1)


def averaged(model: Transformer, decay: float, steps: int) -> WeightAverage:
    """The average over weights that are 1, 2, 3, … everywhere."""
    average = WeightAverage(model, decay)
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.detach().fill_(step)
        average.update(step)
    return average


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_the_weighted_mean_of_the_weights_after_each_step(processes: World, decay: float, steps: int) -> None:
    average = averaged(sharded(processes), decay, steps)
    shares = [decay ** (steps - step) for step in range(1, steps + 1)]
    expected = sum(step * share for step, share in enumerate(shares, 1)) / sum(shares)
    for name, tensor in average.state().items():
        assert tensor.dtype == torch.float32
        full = tensor.full_tensor()  # type: ignore[attr-defined]
        torch.testing.assert_close(full, torch.full_like(full, expected), msg=lambda text, n=name: f"{n}: {text}")


def test_the_model_has_it_within_the_block_and_its_own_weights_to_the_bit_after_it(processes: World) -> None:
    model = sharded(processes)
    average = averaged(model, 0.5, 3)
    with torch.no_grad():
        model.get_parameter(NAME).fill_(0.1)
    inputs = torch.zeros(1, 4, dtype=torch.int64)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            result = model(inputs).clone()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return result

    def weight() -> torch.Tensor:
        return model.get_parameter(NAME).detach().full_tensor()  # type: ignore[attr-defined]

    before, mean = logits(), average.state()[f"average.{NAME}"].full_tensor()  # type: ignore[attr-defined]
    with average.in_the_model():
        assert torch.equal(weight(), mean)
        assert not torch.equal(logits(), before)
    assert torch.equal(weight(), torch.full_like(mean, 0.1))
    assert torch.equal(logits(), before)
