"""The run directory: which one a command works in, and that only one command works in it at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.recipe.file import recipe_from_run, recipe_text

if TYPE_CHECKING:
    from tilewright.trainer.checkpoints.storage import Location

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
# What may change between the start of a run and its resumption: nothing that decides what is computed (`compile`,
# `optimizer.implementation`, `batch.micro_batch` and how a model is spread change roundings alone; corpora are compared
# by the hashes that they were built with, and their weights with them).
_FREE_TO_CHANGE = (
    "name", "runs", "run_directory", "evaluation", "sample", "compile", "batch.micro_batch",
    "data.corpus", "data.sources", "data.tokenizer", "data.heldout", "data.prefetch", "optimizer.implementation",
    "checkpoints.every", "checkpoints.keep", "checkpoints.keep_every", "checkpoints.keep_best",
    "checkpoints.asynchronous", "parallel", "activation_checkpointing", "health.bad_steps", "health.rollbacks",
    "health.hang_minutes", "health.stop_seconds", "health.slow_rank", "tracking", "profile",
)  # fmt: skip
# How a run is steered, which whoever names its directory may do; without a name, other values begin another run.
_STEERING = (
    "steps", "schedule", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.groups", "optimizer.betas",
    "optimizer.eps", "optimizer.momentum", "optimizer.max_grad_norm", "health", "batch.stages",
    "optimizer.ema_decay", "optimizer.state_dtype", "float8",
    "data.sequence_length_stages",
)  # fmt: skip


def choose_run_directory(recipe: Recipe, fits: Callable[[Path], bool] = lambda run: True) -> Path:
    """The directory for `recipe`: the one it names, or the newest unfinished run of the same recipe, or a new one.

    A run whose directory is named goes on with the learning rate, schedule and number of steps that `recipe` states.

    Args:
        fits: whether an unfinished run may be gone on with, apart from its recipe.

    Raises:
        TrainingError: the directory that the recipe names holds a run of another recipe.
    """
    if recipe.run_directory is not None:
        run = Path(recipe.run_directory)
        if (run / RECIPE).exists():
            refuse_another_recipe(run, recipe)
        return run
    runs = _numbered(Path(recipe.runs), recipe.name)
    for run in reversed(runs):
        # Only the newest can be the one that was interrupted; an older one was given up.
        if is_finished(run) or not (run / RECIPE).is_file():
            break
        if fits(run) and not _differences(recipe_from_run(run / RECIPE), recipe):
            return run
        break
    number = int(runs[-1].name.rsplit("-", 1)[1]) + 1 if runs else 1
    return Path(recipe.runs) / f"{recipe.name}-{number:03d}"


def is_finished(run: Path) -> bool:
    """Whether a run came to its last step."""
    return bool(read_summary(run).get("status") == "finished")


def read_summary(run: Path) -> dict[str, Any]:
    """What the run wrote at its end; empty where there is nothing readable."""
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader, or a crash, never meets half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_recipe(run: Path, recipe: Recipe) -> None:
    """Record the resolved recipe."""
    write_atomically(run / RECIPE, recipe_text(recipe))


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run directory for this command; one that it made and put nothing in goes again if it fails.

    Raises:
        TrainingError: another command holds it.
    """
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    lock = run / ".lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another command is training in {run}; wait for it, stop it, or name another with --run_directory"
            ) from None
        try:
            yield
        except BaseException:
            # Left behind, it would be taken for the newest run, and the next start would begin another after it.
            if made and list(run.iterdir()) == [lock]:
                lock.unlink()
                run.rmdir()
            raise


def _numbered(runs: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + r"-\d{3,}")
    found = [
        path for path in (runs.iterdir() if runs.is_dir() else ()) if path.is_dir() and pattern.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _differences(old: Recipe, new: Recipe, free_to_change: tuple[str, ...] = _FREE_TO_CHANGE) -> list[str]:
    """Keys by which two recipes would give different runs."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    a, b = (dict(flat(dataclasses.asdict(recipe))) for recipe in (old, new))
    free = tuple(f"{section}." for section in free_to_change)
    return [key for key in a if a[key] != b[key] and key not in free_to_change and not key.startswith(free)]


def refuse_another_recipe(run: Location, recipe: Recipe) -> None:
    """Raise unless the run in a directory, or of the checkpoints in a folder, may be gone on with by `recipe`.

    Raises:
        TrainingError: it is one of another recipe.
    """
    free = _FREE_TO_CHANGE + (_STEERING if recipe.run_directory is not None else ())
    different = _differences(recipe_from_run(run / RECIPE), recipe, free)
    if different:
        raise TrainingError(
            f"{run} holds a run of another recipe ({', '.join(different)} differ); "
            "name another --run_directory, or resume with the recipe that it was started with"
        )
