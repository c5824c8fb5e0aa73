"""Going back to a checkpoint when the loss spikes, and on from there with other samples (arXiv:2204.02311, §5.1).

Weights, optimizer, average and loss scale go back together; the data position does not: the samples from the checkpoint
to the step that spiked are left out, as the spike comes of them and the weights together. No step draws random numbers.
``rollbacks.jsonl`` has each rollback before anything follows from it, so a run killed after one goes on as if it had
not been killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.run_directory import write_atomically

ROLLBACKS = "rollbacks.jsonl"


@dataclass(frozen=True)
class Rollback:
    """One of a run's rollbacks.

    Attributes:
        step: that went wrong, counted from 1.
        to: step of the checkpoint that the run went back to.
        sample: the first that it took then.
        cause: in words.
    """

    step: int
    to: int
    sample: int
    cause: str


class Rollbacks:
    """The rollbacks of a run; each of its processes makes one, and calls it alike.

    Args:
        run: its directory.
        step: of the checkpoint that the run goes on from now, 0 for none. Rollbacks to later ones are forgotten: those
            checkpoints are gone, and the steps to them are taken anew.
        most: so many to one checkpoint; one more is refused.
    """

    def __init__(self, run: Path, world: World, *, step: int, most: int) -> None:
        self._path, self._world, self._most = run / ROLLBACKS, world, most

        def known() -> list[Rollback]:
            rollbacks = [rollback for rollback in recorded_rollbacks(run) if rollback.to <= step]
            if self._path.is_file():
                write_atomically(self._path, "".join(map(_line, rollbacks)))
            return rollbacks

        self._known = world.first_decides(known)

    def first_sample(self, step: int) -> int | None:
        """With which sample the run goes on from the checkpoint of `step`; None: with the one that it names."""
        return max((rollback.sample for rollback in self._known if rollback.to == step), default=None)

    def add(self, rollback: Rollback) -> None:
        """Record a rollback, before the run goes back.

        Raises:
            TrainingError: it has gone back to that checkpoint `most` times already, or the disk is full.
        """
        before = sum(other.to == rollback.to for other in self._known)
        if before >= self._most:
            raise TrainingError(
                f"training diverged: {rollback.cause}; the run has gone back to the checkpoint of step {rollback.to} "
                f"{before} times and come to no other (health.rollbacks); the checkpoints are untouched; start another "
                "run with a lower optimizer.learning_rate or a longer schedule.warmup_steps"
            )
        self._known.append(rollback)
        self._world.first_decides(lambda: self._append(rollback))

    def _append(self, rollback: Rollback) -> Path:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(rollback))
            file.flush()
            os.fsync(file.fileno())
        return self._path


def recorded_rollbacks(run: Path) -> list[Rollback]:
    """Those of a run so far, in their order."""
    path = run / ROLLBACKS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a torn line has no end
    try:
        return [Rollback(**json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        raise TrainingError(f"{path} is damaged; bring it back from a copy, or start another run") from None


def _line(rollback: Rollback) -> str:
    return json.dumps(dataclasses.asdict(rollback)) + "\n"
