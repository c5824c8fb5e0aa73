"""float16: the loss scaled so that gradients neither vanish nor overflow."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tilewright.model import from_preset
from tilewright.trainer.loop import train
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import sharded_model, world
from tilewright.trainer.recipe import Optimizer
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics
from tilewright.trainer.step import MicroBatch, StepResult, train_step

Write = Callable[..., Path]
CONFIG = from_preset(
    "llama-10m", vocab_size=40, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=24,
    max_sequence_length=12,
)  # fmt: skip


def test_the_scale_halves_on_an_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale(torch.device("cpu"))
    good, bad = torch.tensor(True), torch.tensor(False)
    scale.update(bad)
    assert scale.scale.item() == 2.0**15
    for _ in range(1999):
        scale.update(good)
    assert (scale.scale.item(), scale.good_steps.item()) == (2.0**15, 1999)
    scale.update(good)
    assert (scale.scale.item(), scale.good_steps.item()) == (2.0**16, 0)
    for _ in range(40):
        scale.update(bad)
    assert scale.scale.item() == 1.0


def step(dtype: torch.dtype, scale: LossScale | None) -> StepResult:
    inputs = torch.arange(24).view(2, 12)
    micro_batches = [MicroBatch(rows[None], rows[None].flip(1), None) for rows in inputs]
    with world() as process:
        model = sharded_model(CONFIG, process, compute_dtype=dtype, compile=False, seed=5)
        optimizer = build_optimizer(model, Optimizer(learning_rate=1e-2))
        return train_step(model, optimizer, micro_batches, process, max_grad_norm=1.0, loss_scale=scale)


def test_a_scaled_step_has_the_norms_of_a_plain_one() -> None:
    plain, scaled = step(torch.float32, None), step(torch.float16, LossScale(torch.device("cpu")))
    assert scaled.stepped
    assert not scaled.overflowed
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-3)
    for place, norm in plain.grad_norms.items():
        assert scaled.grad_norms[place] == pytest.approx(norm, rel=5e-3)


def test_an_overflow_skips_the_step_and_says_that_it_was_the_scale() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.scale.fill_(2.0**24)
    result = step(torch.float16, scale)
    assert (result.stepped, result.overflowed) == (False, True)
    assert scale.scale.item() == 2.0**23


def test_a_float16_run_goes_on_from_its_checkpoint_with_its_scale(tiny_recipe: Write) -> None:
    recipe = load_recipe(str(tiny_recipe(compute_dtype="float16", checkpoints__keep=9)))
    run = train(recipe, Console(file=io.StringIO())).run
    whole = read_metrics(run / "metrics.jsonl")[0]
    assert not any(line["skipped"] for line in whole)
    for kept in sorted((run / "checkpoints").iterdir())[1:]:
        (kept / "COMMITTED.json").unlink()
    (run / "summary.json").unlink()
    again = load_recipe(str(tiny_recipe(compute_dtype="float16", checkpoints__keep=9)), ["--run_directory", str(run)])
    train(again, Console(file=io.StringIO()))
    assert [line["loss"] for line in read_metrics(run / "metrics.jsonl")[0]] == [line["loss"] for line in whole]
