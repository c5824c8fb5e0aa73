"""Runs that are gone on with by another learning rate or for more steps, and whole runs of the other optimizers."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright.trainer import TrainingError, loop
from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics
from tilewright.trainer.trained import evaluate_run, load_trained

from .conftest import Write, kill_in_step, run, steps_of

pytestmark = pytest.mark.usefixtures("without_what_takes_long")


def recorded(run_directory: Path, key: str) -> list[float]:
    return [line[key] for line in steps_of(run_directory)]


def killed_run(recipe: Path, step: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        kill_in_step(step, patch)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, *overrides)


def test_a_run_that_is_named_goes_on_with_the_learning_rate_that_is_stated_now(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(schedule__kind="constant", schedule__warmup_steps=0)
    name = ("--run_directory", str(recipe.parent / "named"))
    killed_run(recipe, 5, monkeypatch, *name)
    outcome, _ = run(recipe, *name, "--optimizer.learning_rate", "3e-3", "--optimizer.weight_decay", "0")
    assert recorded(outcome.run, "lr") == pytest.approx([1e-2] * 4 + [3e-3] * 2)


def test_a_finished_run_goes_on_for_more_steps_with_a_restart(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(schedule__kind="linear", schedule__final_fraction=0.0)
    name = ("--run_directory", str(recipe.parent / "named"))
    run(recipe, *name)
    outcome, _ = run(recipe, *name, "--steps", "10", "--schedule.restarts", "[6]")
    expected = [0.5, 1, 0.75, 0.5, 0.25, 0, 0.5, 1, 0.5, 0]
    assert recorded(outcome.run, "lr") == pytest.approx([1e-2 * factor for factor in expected])
    assert (outcome.status, outcome.step) == ("finished", 10)
    with pytest.raises(TrainingError, match=r"steps is 8, and .*named has come to step 10 already; raise steps"):
        run(recipe, *name, "--steps", "8")


@pytest.mark.parametrize(
    "refused", [["--optimizer.groups", "[{match: nothing}]"], ["--activation_checkpointing.keep", "[nothing]"]]
)
def test_a_start_that_is_refused_leaves_the_run_as_it_was(tiny_recipe: Write, refused: list[str]) -> None:
    recipe = tiny_recipe(
        steps=4, checkpoints__every=2, sample__prompt="", activation_checkpointing={"mode": "selective"}
    )
    outcome, _ = run(recipe)
    named = ["--run_directory", str(outcome.run), "--steps", "6"]
    before = {path.name: path.read_bytes() for path in outcome.run.iterdir() if path.is_file()}
    with pytest.raises(TrainingError):
        run(recipe, *named, *refused)
    assert {path.name: path.read_bytes() for path in outcome.run.iterdir() if path.is_file()} == before
    assert run(recipe, *named)[0].step == 6


@pytest.mark.parametrize("scoring", [1, 2, 3], ids=["before the first step", "on the way", "at the end"])
def test_a_run_that_is_asked_to_stop_while_it_scores_leaves_at_once_and_scores_when_it_goes_on(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scoring: int
) -> None:
    recipe = tiny_recipe(steps=4, evaluation={"every": 2, "windows": 2}, checkpoints__every=0, sample__prompt="")
    whole, _ = run(recipe, "--run_directory", str(tmp_path / "whole"))
    named = ["--run_directory", str(tmp_path / "stopped")]
    evaluate, times = loop.evaluate, 0

    def interrupted(*arguments: Any, stopped: Callable[[], bool], **options: Any) -> Any:
        nonlocal times
        times += 1

        def asked() -> bool:
            if times == scoring:
                os.kill(os.getpid(), signal.SIGTERM)
            return stopped()

        return evaluate(*arguments, stopped=asked, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        outcome, said = run(recipe, *named)
    assert (outcome.status, outcome.step, times) == ("stopped", 2 * (scoring - 1), scoring)
    assert "s after SIGTERM; the same command goes on from there" in said
    assert run(recipe, *named)[0].status == "finished"
    records = [read_metrics(path / "metrics.jsonl") for path in (whole.run, outcome.run)]
    assert records[0][1] == records[1][1]  # evaluations
    assert [line["loss"] for line in records[0][0]] == [line["loss"] for line in records[1][0]]


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_that_is_named_goes_on_with_averages_of_the_other_dtype(
    tiny_recipe: Write, dtypes: tuple[str, str]
) -> None:
    recipe = tiny_recipe(steps=4, schedule__kind="constant", schedule__warmup_steps=0)
    name = ("--run_directory", str(recipe.parent / "mine"))
    run(recipe, *name, "--optimizer.state_dtype", dtypes[0])
    outcome, _ = run(recipe, *name, "--optimizer.state_dtype", dtypes[1], "--steps", "6")
    whole, _ = run(recipe, "--optimizer.state_dtype", dtypes[0], "--steps", "6")
    losses, expected = recorded(outcome.run, "loss"), recorded(whole.run, "loss")
    assert len(losses) == 6
    assert losses[:5] == expected[:5]
    # Averages that began anew would take a step several times as large.
    assert losses[5] == pytest.approx(expected[5], rel=1e-4)


@pytest.mark.parametrize("optimizer", [{"kind": "muon"}, {"state_dtype": "float32"}, {}])
def test_a_killed_run_of_any_optimizer_with_averaged_weights_goes_on_to_the_bit(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, str]
) -> None:
    changes = {f"optimizer__{key}": value for key, value in optimizer.items()}
    groups = [{"match": "mlp", "learning_rate_factor": 0.5}]
    recipe = tiny_recipe(optimizer__ema_decay=0.6, optimizer__groups=groups, **changes)
    whole, _ = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    killed_run(recipe, 6, monkeypatch)
    resumed, _ = run(recipe)
    for key in ("loss", "grad_norm"):
        assert recorded(resumed.run, key) == recorded(whole.run, key)
    last = [read_metrics(outcome.run / "metrics.jsonl")[1][-1]["eval"] for outcome in (whole, resumed)]
    assert last[0] == last[1]
    losses = {name: last[0][name]["loss"] for name in ("heldout", "heldout_averaged")}
    assert 0 < abs(losses["heldout"] - losses["heldout_averaged"]) < 1
    summary = json.loads((whole.run / "summary.json").read_text())
    assert summary["heldout_averaged"] == last[0]["heldout_averaged"]
    for averaged, name in ((False, "heldout"), (True, "heldout_averaged")):
        assert evaluate_run(whole.run, averaged=averaged)[1]["heldout"]["loss"] == pytest.approx(losses[name], rel=1e-5)


def test_an_average_that_begins_within_a_run_begins_with_the_weights_of_then(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        schedule__kind="constant", sample__prompt="", evaluation__every=0, checkpoints__every=1, checkpoints__keep=9
    )
    name = ("--run_directory", str(recipe.parent / "named"))
    run(recipe, *name, "--steps", "4")
    output = io.StringIO()
    with monkeypatch.context() as patch:
        kill_in_step(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(str(recipe), (*name, "--optimizer.ema_decay", "0.5")), Console(file=output, width=200))
    assert "averaged     weights from those of step 4 on: no average was kept before" in output.getvalue()
    with pytest.raises(TrainingError, match=r"is of a step before optimizer.ema_decay was set"):
        evaluate_run(recipe.parent / "named", averaged=True)
    outcome, _ = run(recipe, *name, "--optimizer.ema_decay", "0.5")
    # The weights of step 4 stand for those of the steps 1 to 4.
    weights = {}
    for step in (4, 5, 6):
        shutil.copytree(outcome.run, folder := recipe.parent / f"at-{step}", dirs_exist_ok=True)
        for later in (folder / "checkpoints").iterdir():
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        weights[step] = load_trained(folder, torch.device("cpu")).model.state_dict()
    average = load_trained(outcome.run, torch.device("cpu"), averaged=True).model.state_dict()
    total = sum(0.5**n for n in range(6))
    for key, value in average.items():
        expected = (weights[6][key] + 0.5 * weights[5][key] + (total - 1.5) * weights[4][key]) / total
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_another_kind_of_optimizer_does_not_go_on_with_a_run(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(sample__prompt="")
    name = ("--run_directory", str(recipe.parent / "named"))
    run(recipe, *name, "--steps", "2")
    with pytest.raises(TrainingError, match=r"named holds a run of another recipe \(optimizer.kind differ\)"):
        run(recipe, *name, "--optimizer.kind", "sgd")


def test_averaged_weights_that_were_not_kept_are_refused(tiny_recipe: Write) -> None:
    outcome, _ = run(tiny_recipe(steps=1, schedule__warmup_steps=0, sample__prompt=""))
    with pytest.raises(TrainingError, match=r"keeps no average of its weights: its recipe has optimizer.ema_decay 0"):
        evaluate_run(outcome.run, averaged=True)
