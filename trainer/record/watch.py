"""A run followed from another terminal: ``tilewright watch RUN`` shows what the run's own terminal shows.

Only `metrics.jsonl` is read, as it grows, so a run on another machine can be followed over a shared file system.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tilewright.trainer.recipe.file import recipe_from_run
from tilewright.trainer.record.display import Display
from tilewright.trainer.record.metrics import METRICS
from tilewright.trainer.run_directory import RECIPE, SUMMARY

_POLL_SECONDS = 1.0


def watch(run: Path, display: Display, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Show `run` until it has finished.

    Args:
        wait: called with seconds between two looks at the file.

    Raises:
        TrainingError: it is no run directory.
    """
    recipe = recipe_from_run(run / RECIPE)
    display.start(recipe.name, recipe.steps, 0, {"run": str(run)})
    for line in _lines(run, wait):
        if "eval" in line:
            display.evaluation(line["step"], {name: _numbers(result) for name, result in line["eval"].items()})
        else:
            display.step(**_numbers(line))
    display.stop()
    display.message(f"the run has finished; its report is {run / 'report.html'}")


def _lines(run: Path, wait: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    """The lines of the run's record as they come, until its summary says that there will be no more."""
    path, read, rest = run / METRICS, 0, b""
    while True:
        finished = (run / SUMMARY).is_file()  # asked before the file is read, so that its last lines are not missed
        if path.is_file():
            size = path.stat().st_size
            if size < read:  # the run was resumed from an earlier step and the lines after it are gone
                read, rest = 0, b""
            with path.open("rb") as file:
                file.seek(read)
                fresh = file.read()
            read += len(fresh)
            *whole, rest = (rest + fresh).split(b"\n")
            yield from (line for line in map(_parsed, whole) if line is not None)
        if finished:
            return
        wait(_POLL_SECONDS)


def _numbers(figures: dict[str, Any]) -> Any:
    """The figures, with nan for those that are null as they were not finite."""
    return {name: float("nan") if value is None else value for name, value in figures.items()}


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line, or None for one that a killed process has torn."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None
