"""Several processes over gloo give the run that one process gives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tilewright.trainer.record.metrics import read_metrics

from .conftest import Write, torchrun


def trained(processes: int, recipe: Path, run: Path, *overrides: str) -> tuple[list[Any], list[Any]]:
    done = torchrun(processes, recipe, "--run_directory", str(run), *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(run / "metrics.jsonl")


def assert_same_run(one: tuple[list[Any], list[Any]], other: tuple[list[Any], list[Any]]) -> None:
    assert len(one[0]) == len(other[0]) == 6
    for a, b in zip(one[0], other[0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"]
    for a, b in zip(one[1], other[1], strict=True):
        assert a["eval"]["heldout"] == pytest.approx(b["eval"]["heldout"], rel=1e-3)
        assert a["eval"]["heldout"]["tokens"] == b["eval"]["heldout"]["tokens"]


@pytest.mark.parametrize("preset", ["llama-10m", "gpt2"])
def test_two_processes_find_the_losses_of_one(tiny_recipe: Write, tmp_path: Path, preset: str) -> None:
    recipe = tiny_recipe(model__preset=preset)
    one, two = trained(1, recipe, tmp_path / "one"), trained(2, recipe, tmp_path / "two", "--profile.steps", "[6]")
    assert_same_run(one, two)
    assert all("reduce" not in line["seconds"] for line in one[0])
    assert all(line["seconds"]["reduce"] > 0 for line in two[0])
    whole, half = (run[0][-1]["memory"] for run in (one, two))
    for kind in ("parameters", "optimizer"):
        assert half[kind] == pytest.approx(whole[kind] / 2, rel=0.01)
    profiles = {path.name for path in (tmp_path / "two" / "profile" / "step-00000006").glob("*.trace.json.gz")}
    assert profiles == {"rank-0.trace.json.gz", "rank-1.trace.json.gz"}


def test_a_run_started_on_two_processes_goes_on_with_one_and_back(tiny_recipe: Write, tmp_path: Path) -> None:
    """Stopped by a checkpoint schedule that outlives its steps: 2 steps on two, 4 on one, 6 on two."""
    recipe = tiny_recipe(schedule__kind="constant")
    whole = trained(1, recipe, tmp_path / "whole")
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        path = tiny_recipe(schedule__kind="constant", steps=6, name=f"part-{steps}")
        changed = trained_to(processes, path, tmp_path / "parts", steps)
    assert_same_run(whole, changed)


def trained_to(processes: int, recipe: Path, run: Path, steps: int) -> tuple[list[Any], list[Any]]:
    """Train up to the checkpoint of `steps` and be killed there, or finish."""
    environment_stop = "" if steps == 6 else str(steps)
    program = (
        "import os, sys, tilewright.trainer.loop as loop\n"
        "from tilewright.cli.main import main\n"
        "stop = sys.argv.pop(1)\n"
        "if stop:\n"
        "    loop._Training._asked_to_stop = lambda self: self.step == int(stop)\n"
        "os._exit(main(sys.argv[1:]))\n"
    )
    script = run.parent / "train_until.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(script), environment_stop, "train", str(recipe), "--run_directory", str(run)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(run / "metrics.jsonl")


def test_a_batch_that_the_processes_do_not_divide_ends_in_one_sentence_and_status_2(tiny_recipe: Write) -> None:
    done = torchrun(2, tiny_recipe(batch__sequences=9, batch__micro_batch=1))
    assert "tilewright: batch.sequences is 9, which 2 processes do not divide; set it to 8 or 10" in done.stderr
    # The launcher reports the failed process with a traceback of its own; none may show our code.
    assert "cli/main.py" not in done.stderr
    _, _, cause = done.stderr.partition("Root Cause (first observed failure):")
    assert "exitcode  : 2" in cause
    assert "traceback : batch.sequences is 9, which 2 processes do not divide" in cause
