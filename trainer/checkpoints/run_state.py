"""What a run is at a step: all that a checkpoint keeps of it, and that comes back from one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from tilewright.trainer.build import build
from tilewright.trainer.checkpoints import checkpoint
from tilewright.trainer.checkpoints.files import HeldOut
from tilewright.trainer.health.hang import alive
from tilewright.trainer.health.rollback import Rollback, Rollbacks
from tilewright.trainer.optimization.averaging import AVERAGE, WeightAverage
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.stages import SAMPLE, DataPosition


class RunState:
    """The state of a run, as its newest committed checkpoint has it or, where there is none, as a run begins.

    Each process of the run makes one, and calls it alike.

    Args:
        run: its directory.
        stack: holds what must be closed at the end of the run.

    Attributes:
        model, optimizer: sharded over the processes.
        loss_scale: of float16.
        average: of the weights, where the recipe has one kept.
        averaged_from: the step whose weights stand for all before it in the average; 0: it has seen every step.
        position: which samples each step takes.
        step: optimizer steps done.
        saved_step: as of the newest checkpoint; 0 where there is none.
        writer: of the run's checkpoints.

    Raises:
        TrainingError: the checkpoint cannot be read, or is of another model.
    """

    def __init__(self, recipe: Recipe, run: Path, processes: World, stack: ExitStack) -> None:
        self._run, self._folder, self._processes = run, recipe.checkpoints.folder, processes
        self.model, self.optimizer, self.loss_scale = build(recipe, processes)
        decay = recipe.optimizer.ema_decay
        self.average = WeightAverage(self.model, decay) if decay else None
        self.averaged_from = 0
        self.writer = stack.enter_context(checkpoint.CheckpointWriter(run, processes, recipe.checkpoints))
        self.step, self.position = 0, DataPosition(recipe.batch)
        self._resume()
        self.saved_step = self.step
        self._rollbacks = Rollbacks(run, processes, step=self.step, most=recipe.health.rollbacks)
        if (sample := self._rollbacks.first_sample(self.step)) is not None:
            self.position.go_on(self.step, sample)

    def count_step(self) -> None:
        """A step was taken, or skipped: the average's formula counts those too."""
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def save(self, *, heldout: HeldOut | None) -> None:
        """Take a checkpoint; see `CheckpointWriter.save`."""
        tensors = self._tensors()
        alive()
        self.writer.save(tensors, self.step, heldout=heldout)
        alive()
        self.saved_step = self.step

    def go_back(self, cause: str) -> Rollback:
        """Go back to the newest checkpoint, and on from there with the samples after those of this step.

        Raises:
            TrainingError: that checkpoint could not be written or read, or the run went back to it too often.
        """
        self.writer.wait()
        alive()
        # The one that this process knows of, not what a listing has, which may lag behind.
        newest = checkpoint.checkpoint_of(checkpoint.checkpoint_folder(self._run, self._folder), self.saved_step)
        rollback = Rollback(self.step, newest.step, self.position.first_sample(self.step), cause)
        self._rollbacks.add(rollback)
        self._load(newest)
        self.position.go_on(self.step, rollback.sample)
        return rollback

    def _resume(self) -> None:
        for newest in self._processes.first_decides(lambda: checkpoint.committed(self._run, self._folder)[-1:]):
            self._load(newest)

    def _load(self, saved: checkpoint.Committed) -> None:
        missing = checkpoint.load(saved, self._tensors(), self._processes, optional=(SAMPLE, AVERAGE))
        self.step = saved.step
        self.position.loaded(self.step, stored=SAMPLE not in missing)
        if self.average is not None and self.average.state().keys() <= missing:
            self.average.begin()
            self.averaged_from = self.step

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Those of a checkpoint, by name."""
        state = checkpoint.training_state(self.model, self.optimizer) | self.position.state(self.step)
        for part in (self.average, self.loss_scale):
            state |= part.state() if part is not None else {}
        return state
