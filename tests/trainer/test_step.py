"""The mathematics of a step, against one plain step on the whole batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tilewright.model import ModelConfig, Transformer, from_preset, initialise
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, check_batch, sharded_model, world
from tilewright.trainer.recipe import Optimizer
from tilewright.trainer.step import MicroBatch, train_step

CONFIG = from_preset(
    "llama-10m", vocab_size=40, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=24,
    max_sequence_length=12, initial_std=0.2,
)  # fmt: skip
ADAMW = Optimizer(learning_rate=1e-2, weight_decay=0.3, betas=(0.8, 0.9))


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def ragged(count: int) -> list[MicroBatch]:
    """One row each, with different numbers of valid tokens: 12, 9, 6, 3, …"""
    generator = torch.Generator().manual_seed(0)
    micros = []
    for number in range(count):
        inputs, targets = (torch.randint(40, (1, 12), generator=generator) for _ in range(2))
        targets[0, 12 - 3 * number :] = -100
        micros.append(MicroBatch(inputs, targets, None))
    return micros


def sharded(config: ModelConfig, processes: World, dtype: torch.dtype = torch.float32) -> Transformer:
    return sharded_model(config, processes, compute_dtype=dtype, compile=False, seed=5)


def plain_step(micros: list[MicroBatch], max_grad_norm: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and parameters after one AdamW step by PyTorch alone, on all rows at once."""
    model = Transformer(CONFIG)
    initialise(model, 5)
    inputs, targets = torch.cat([m.inputs for m in micros]), torch.cat([m.targets for m in micros])
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if p.ndim == 2 and n != "embedding.weight"], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if p.ndim == 1 or n == "embedding.weight"], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9)).step()
    return loss.item(), norm.item(), {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_accumulated_ragged_micro_batches_are_one_step_on_all_their_tokens(
    processes: World, max_grad_norm: float
) -> None:
    micros = ragged(4)
    model = sharded(CONFIG, processes)
    result = train_step(model, build_optimizer(model, ADAMW), micros, processes, max_grad_norm=max_grad_norm)
    loss, norm, parameters = plain_step(micros, max_grad_norm)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert norm > 0.05, "the clipped case must clip"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), parameters[name], rtol=1e-3, atol=2e-5)


def test_the_masters_stay_float32_under_bfloat16_compute(processes: World) -> None:
    model = sharded(CONFIG, processes, torch.bfloat16)
    optimizer = build_optimizer(model, ADAMW)
    before = model.blocks[0].mlp.down.weight.full_tensor().clone()
    result = train_step(model, optimizer, ragged(2), processes, max_grad_norm=1.0)
    full = train_step_loss_in_float32(processes)
    assert result.loss == pytest.approx(full, rel=2e-2)
    assert result.loss != full, "the compute dtype made no difference, so it was not used"
    after = model.blocks[0].mlp.down.weight.full_tensor()
    assert after.dtype == torch.float32
    # AdamW's first step moves each weight by about the learning rate, which bfloat16 masters would round.
    assert not torch.equal(after, after.bfloat16().float())
    assert (after - before).abs().mean().item() == pytest.approx(1e-2, rel=0.2)


def train_step_loss_in_float32(processes: World) -> float:
    model = sharded(CONFIG, processes)
    return train_step(model, build_optimizer(model, ADAMW), ragged(2), processes, max_grad_norm=1.0).loss


def test_a_step_without_any_valid_token_changes_nothing_into_nan(processes: World) -> None:
    (micro,) = ragged(1)
    micro.targets.fill_(-100)
    model = sharded(CONFIG, processes)
    result = train_step(model, build_optimizer(model, ADAMW), [micro], processes, max_grad_norm=1.0)
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert all(p.full_tensor().isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("sequences", "micro_batch", "size", "message"),
    [
        (10, 1, 4, "batch.sequences is 10, which 4 processes do not divide; set it to 8 or 12"),
        (2, 1, 3, "batch.sequences is 2, which 3 processes do not divide; set it to 3"),
        (16, 5, 2, "batch.micro_batch is 5, which does not divide the 8 sequences .* set batch.micro_batch to 4"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    sequences: int, micro_batch: int, size: int, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        check_batch(sequences, micro_batch, size)
    check_batch(16, 4, 2)
