"""float8 products, emulated on a CPU where torchao is installed, and what is said where they cannot be."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.cli.main import main
from tilewright.model import from_preset
from tilewright.trainer.checkpoints.checkpoint import training_state
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.float8 import check_torchao
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.plan.dry_run import plan
from tilewright.trainer.recipe import ActivationCheckpointing, Optimizer
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.step import MicroBatch, StepResult, train_step

Write = Callable[..., Path]
CONFIG = from_preset(
    "llama-10m", vocab_size=40, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48,
    max_sequence_length=16, initial_std=0.2,
)  # fmt: skip
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def process() -> Iterator[World]:
    with world() as alone:
        yield alone


def model_of(process: World, scaling: str, mode: str = "none", **options: Any) -> Any:
    checkpointing = ActivationCheckpointing(mode=mode)  # type: ignore[arg-type]
    config = dataclasses.replace(CONFIG, **options)
    return sharded_model(
        config, process, compute_dtype=torch.bfloat16, compile=False, seed=5, float8=scaling,
        activation_checkpointing=checkpointing,
    )  # fmt: skip


def trained(process: World, model: Any, steps: int) -> list[StepResult]:
    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-2))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (4, 17), generator=draw)
    batches = [MicroBatch(rows[:, :-1], rows[:, 1:], None) for rows in tokens.split(2)]
    return [train_step(model, optimizer, batches, process, max_grad_norm=1.0) for _ in range(steps)]


@needs_torchao
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_the_matrices_of_the_blocks_alone_multiply_in_float8(process: World, scaling: str) -> None:
    plain, model = model_of(process, "none"), model_of(process, scaling)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds.pop("head", "Linear") == "Linear"
    assert len(kinds) == 4 * CONFIG.layers
    assert set(kinds.values()) == {"Float8Linear"}
    # The same checkpoint, whichever wrote it.
    states = [{name: (x.shape, x.dtype) for name, x in training_state(m).items()} for m in (plain, model)]
    assert states[0] == states[1]
    before, after = trained(process, plain, 1)[0], trained(process, model, 1)[0]
    assert 1e-5 < abs(after.loss - before.loss) < 0.02 * before.loss
    assert after.grad_norm == pytest.approx(before.grad_norm, rel=0.05)


@needs_torchao
def test_a_model_learns_in_float8_as_it_does_in_bfloat16(process: World) -> None:
    plain, rowwise, tensorwise = (trained(process, model_of(process, x), 20) for x in ("none", "rowwise", "tensorwise"))
    for results in (plain, rowwise, tensorwise):
        assert [result.loss for result in results[:4]] == pytest.approx([other.loss for other in plain[:4]], rel=0.02)
        assert results[-1].loss < 0.02 * results[0].loss


@needs_torchao
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_in_float8_comes_to_the_same(process: World, mode: str) -> None:
    kept, again = (trained(process, model_of(process, "rowwise", how), 3) for how in ("none", mode))
    assert [(result.loss, result.grad_norm) for result in again] == [(result.loss, result.grad_norm) for result in kept]


@needs_torchao
def test_sizes_that_the_products_do_not_take_are_named(process: World) -> None:
    with pytest.raises(TrainingError, match=r"blocks.0.mlp.gate_up.weight is \(72, 32\); change the model's sizes"):
        model_of(process, "rowwise", intermediate_size=36)


def test_without_torchao_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_torchao("none")
    with pytest.raises(TrainingError, match=r"float8 is 'rowwise', .* with pip install 'tilewright\[float8\]'"):
        check_torchao("rowwise")


def test_where_there_are_no_such_products_a_run_is_refused_before_it_begins(
    tiny_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(compute_dtype="bfloat16", float8="tensorwise")
    assert main(["train", str(recipe)]) == 2
    told = "takes a GPU of compute capability 8.9 or more, such as an H100, and this run has no GPU; set float8 to none"
    assert told in capsys.readouterr().err
    assert not (recipe.parent / "runs").exists()
    with pytest.raises(TrainingError, match=r"and this GPU has 8\.0"):
        plan(load_recipe(str(recipe)), "2xA100")
    assert plan(load_recipe(str(recipe)), "2xH100").micro_batches == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"compute_dtype": "float32"},
            "float8 is 'rowwise' and compute_dtype 'float32'; set compute_dtype",
        ),
        ({"data__sequence_length": 3}, r"batch.micro_batch x data.sequence_length is 6; change one of them"),
        ({"float8": "blockwise"}, "float8"),
    ],
)
def test_what_does_not_fit_float8_is_refused_by_name(tiny_recipe: Write, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        load_recipe(str(tiny_recipe(**{"compute_dtype": "bfloat16", "float8": "rowwise", **changes})))
