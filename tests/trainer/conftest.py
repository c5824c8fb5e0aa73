"""Whole runs: made, looked at, cut short, and with what takes long left out."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tilewright.trainer import loop
from tilewright.trainer.loop import Outcome, train
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics

Write = Callable[..., Path]


def run(recipe: Path, *overrides: str) -> tuple[Outcome, str]:
    """Train by a recipe's file; how it ended, and what was shown."""
    output = io.StringIO()
    outcome = train(load_recipe(str(recipe), overrides), Console(file=output, width=300))
    return outcome, output.getvalue()


def torchrun(processes: int, recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train by a recipe's file on several processes, through the command line, on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tilewright.cli", "train", str(recipe), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def steps_of(run_directory: Path) -> list[dict[str, Any]]:
    """The lines of training in the record of a run."""
    return read_metrics(run_directory / "metrics.jsonl")[0]


def kill_in_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die in its step `number`, as if killed there: nothing is saved on the way out."""
    step, calls = loop.train_step, 0

    def killed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", killed)


@pytest.fixture
def without_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no report and measure no peak."""
    monkeypatch.setattr(loop, "write_report", lambda run: run)
    monkeypatch.setattr(loop, "measured_matmul_peak", lambda *arguments: 1e12)


@pytest.fixture
def process() -> Iterator[World]:
    """This process alone."""
    with world() as alone:
        yield alone
