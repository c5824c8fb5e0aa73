"""A run predicted for GPUs that are not there."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tilewright.cli.main import main
from tilewright.model import from_preset
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.plan.dry_run import check_fits, plan, plan_text
from tilewright.trainer.recipe import ActivationCheckpointing, Batch, Data, Optimizer, Parallel, Recipe

LAYERS, WIDTH, LENGTH = 32, 4096, 8192
PARAMETERS = 8_030_261_248  # as Meta states it for Llama 3 8B: 8.03 billion


def recipe(
    mode: str = "none", *, sequences: int = 256, micro_batch: int = 1, parallel: Parallel | None = None
) -> Recipe:
    return Recipe(
        name="eight",
        model=from_preset("llama-3-8b"),
        data=Data(corpus="", sequence_length=LENGTH),
        batch=Batch(sequences=sequences, micro_batch=micro_batch),
        steps=10,
        optimizer=Optimizer(learning_rate=1e-4),
        parallel=parallel or Parallel(),
        activation_checkpointing=ActivationCheckpointing(mode=mode),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("processes", [8, 64, 1024])
def test_what_is_sharded_falls_as_one_over_the_processes(processes: int) -> None:
    memory = plan(recipe(sequences=1024), f"{processes}xH100").memory
    for kind, times in (("parameters", 4), ("gradients", 4), ("optimizer", 4)):
        assert memory[kind] == pytest.approx(times * PARAMETERS / processes, rel=1e-3)


@pytest.mark.parametrize("implementation", ["auto", "torch", "tilewright"])
def test_float32_state_is_twice_the_memory_of_the_optimizer(implementation: str) -> None:
    wide = Optimizer(learning_rate=1e-4, implementation=implementation, state_dtype="float32")  # type: ignore[arg-type]
    memory = plan(dataclasses.replace(recipe(), optimizer=wide), "64xH100").memory
    assert memory["optimizer"] == pytest.approx(8 * PARAMETERS / 64, rel=1e-3)


def test_replicas_each_hold_a_whole_model() -> None:
    whole = plan(recipe(), "64xH100").memory
    halves = plan(recipe(parallel=Parallel(replicas=2)), "64xH100").memory
    assert halves["parameters"] == pytest.approx(2 * whole["parameters"], rel=1e-3)


def test_full_checkpointing_keeps_the_inputs_of_the_blocks_alone() -> None:
    stream = LENGTH * WIDTH * torch.bfloat16.itemsize
    assert plan(recipe("full"), "256xH100").memory["kept activations"] == (LAYERS + 1) * stream


def test_less_kept_is_less_memory_and_twice_the_micro_batch_twice_as_much() -> None:
    full, selective, none = (
        plan(recipe(mode), "256xH100").memory["kept activations"] for mode in ("full", "selective", "none")
    )
    assert 2 * full < selective < none
    # Per token and layer: qkv, attention's result and statistics, out, gate_up, down, SwiGLU's and the norms' results.
    per_token = none / (LAYERS * LENGTH * WIDTH * torch.bfloat16.itemsize)
    assert 15 < per_token < 22
    twice = plan(recipe("none", sequences=512, micro_batch=2), "256xH100").memory["kept activations"]
    assert twice == pytest.approx(2 * none, rel=1e-3)


def test_whole_gradients_are_kept_only_while_they_wait_for_one_reduction() -> None:
    once = plan(recipe(sequences=1024), "256xH100")
    every = plan(recipe(sequences=1024, parallel=Parallel(reduce="every")), "256xH100")
    assert once.micro_batches == every.micro_batches == 4
    assert once.memory["whole gradients"] == 4 * PARAMETERS
    assert every.memory["whole gradients"] < PARAMETERS
    assert every.traffic.reduce_scatter.count == 4 * once.traffic.reduce_scatter.count


def test_a_budget_is_planned_as_its_share() -> None:
    def kept(budget: float) -> int:
        asked = ActivationCheckpointing(mode="budget", budget=budget)
        return plan(dataclasses.replace(recipe(), activation_checkpointing=asked), "256xH100").memory[
            "kept activations"
        ]

    full, none = (plan(recipe(mode), "256xH100").memory["kept activations"] for mode in ("full", "none"))
    assert (kept(0.0), kept(1.0)) == (full, none)
    assert kept(0.25) == pytest.approx(full + 0.25 * (none - full), rel=1e-6)
    asked = dataclasses.replace(recipe(), activation_checkpointing=ActivationCheckpointing(mode="budget"))
    assert "the budget's share of what mode none keeps" in plan_text(plan(asked, "256xH100"))


def test_what_cannot_fit_is_refused_with_what_would_help() -> None:
    with pytest.raises(
        TrainingError, match=r"predicted: a process needs .* H100 has 80 GB.*kept activations.*selective"
    ):
        check_fits(plan(recipe("none", sequences=16, micro_batch=2), "8xH100"))
    check_fits(plan(recipe("full"), "256xH100"))


@pytest.mark.parametrize("as_if", ["256", "xH100", "0xH100", "8xV100", "H100x8"])
def test_gpus_that_nobody_knows_are_refused_by_name(as_if: str) -> None:
    with pytest.raises(TrainingError, match="names no GPUs; write how many and which, as in 256xH100"):
        plan(recipe(), as_if)


@pytest.mark.parametrize("before", [True, False])
def test_the_command_prints_the_plan_and_nothing_is_run(
    before: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--as-if", "2xA100"]
    command = ["train", *flags, "quickstart"] if before else ["train", "quickstart", *flags, "--batch.micro_batch", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("predicted, on 2 x A100")
    assert "kept activations" in shown
    assert "reduce-scatter" in shown
    assert not list(tmp_path.iterdir())


def test_one_flag_without_the_other_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "quickstart"]) == 2
    assert "go together" in capsys.readouterr().err


def test_an_average_of_the_weights_is_counted_and_what_muon_sends_is_said_to_be_missing() -> None:
    changed = dataclasses.replace(recipe(), optimizer=Optimizer(learning_rate=1e-4, kind="muon", ema_decay=0.99))
    planned = plan(changed, "64xH100")
    assert planned.memory["average"] == planned.memory["parameters"]
    # Momentum alone for the matrices of the blocks.
    assert planned.memory["parameters"] < planned.memory["optimizer"] < 2 * planned.memory["parameters"]
    assert "Muon's all-to-alls come on top" in plan_text(planned)
