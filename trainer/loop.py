"""The loop of a run:

    schedule → next batch → micro-batches forward and backward → clip → step → record → evaluate → checkpoint

The mathematics of a step stands apart in `tilewright.trainer.step`, what a run keeps in its checkpoints in `RunState`,
and what is written down and shown of it in `RunRecord`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tilewright.corpus import Batch, MixtureStream, Prefetch, TrainStream
from tilewright.trainer.checkpoints import checkpoint
from tilewright.trainer.checkpoints.files import HeldOut
from tilewright.trainer.checkpoints.identity import check_identity, keep_identity
from tilewright.trainer.checkpoints.run_state import RunState
from tilewright.trainer.data import (
    CORPUS,
    HELDOUT,
    HELDOUT_AVERAGED,
    TrainingData,
    is_same_data,
    open_data,
    samples_of,
)
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.evaluate import ScoringStopped, evaluate
from tilewright.trainer.health.check import HealthCheck
from tilewright.trainer.health.early_stopping import no_longer_improves
from tilewright.trainer.health.hang import alive, hang_watch, not_watched
from tilewright.trainer.health.interruption import Interruption
from tilewright.trainer.optimization.optimizer import set_learning_rate
from tilewright.trainer.optimization.schedule import learning_rate_factor
from tilewright.trainer.parallel.float8 import check_float8, check_torchao, generation_of
from tilewright.trainer.parallel.peers import ended_with_the_others
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.peak import measured_matmul_peak
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.metrics import METRICS, read_metrics
from tilewright.trainer.record.report import write_report
from tilewright.trainer.record.run_record import RunRecord
from tilewright.trainer.record.summary import closing_text, finished_facts, write_summary
from tilewright.trainer.record.tracking import check_installed
from tilewright.trainer.run_directory import SUMMARY, choose_run_directory, locked, save_recipe, write_atomically
from tilewright.trainer.stages import check_batches, length_at, sequences_at
from tilewright.trainer.step import MicroBatch, train_step
from tilewright.trainer.trained import check_kernels, check_vocabulary


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: ``finished`` or ``stopped``, after which step, and where its record is."""

    status: str
    step: int
    run: Path
    report: Path


def train(recipe: Recipe, console: Console) -> Outcome:
    """Train by `recipe`, from the beginning or on from the run's last committed checkpoint.

    Raises:
        TrainingError, CorpusError: the recipe, the corpus or a checkpoint does not fit, or the disk is full.
    """
    with world() as processes, ended_with_the_others(processes) as leaving, ExitStack() as stack, leaving:
        check_batches(recipe.batch, processes.size)
        check_kernels(processes.device, getattr(torch, recipe.compute_dtype))
        check_float8(recipe.float8, generation_of(processes.device))
        check_torchao(recipe.float8)
        data = open_data(recipe.data)
        check_vocabulary(recipe, data)
        stream = data.train_stream(sequence_length=recipe.data.sequence_length, seed=recipe.seed)
        run = processes.first_decides(lambda: _open_run(recipe, data, stack))
        interruption = stack.enter_context(Interruption(recipe.health.stop_seconds))
        return _Training(recipe, data, stream, run, processes, interruption, console, stack).go()


def _open_run(recipe: Recipe, data: TrainingData, stack: ExitStack) -> Path:
    """Choose and lock the run directory; what is in it stays as it is until the run has been put together."""
    check_installed(recipe.tracking)
    run = choose_run_directory(recipe, lambda run: is_same_data(run, data))
    stack.enter_context(locked(run))
    check_identity(run, recipe, data)
    for done in checkpoint.committed(run, recipe.checkpoints.folder)[-1:]:
        if done.step > recipe.steps:
            raise TrainingError(
                f"steps is {recipe.steps}, and {run} has come to step {done.step} already; raise steps, or name "
                "another --run_directory"
            )
    return run


def _record_run(run: Path, recipe: Recipe, data: TrainingData) -> None:
    """Write down what the run is made of."""
    save_recipe(run, recipe)
    write_atomically(run / CORPUS, json.dumps(data.identity(), indent=1))
    keep_identity(run, recipe)


class _Training:
    """One run in the making: its parts, put together once."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        stream: TrainStream | MixtureStream,
        run: Path,
        processes: World,
        interruption: Interruption,
        console: Console,
        stack: ExitStack,
    ) -> None:
        began = time.time()
        self.recipe, self.data, self.stream, self.run = recipe, data, stream, run
        self.processes, self.interruption = processes, interruption
        self.heldout = data.heldout_streams(sequence_length=recipe.data.sequence_length)
        # All processes measure at the same time, as they will compute.
        (self.peak,) = processes.sum(measured_matmul_peak(processes.device, getattr(torch, recipe.compute_dtype)))
        self.state = RunState(recipe, run, processes, stack)
        processes.first_decides(lambda: _record_run(run, recipe, data))
        self.batches = stack.enter_context(Prefetch(self._read, first=self.step, depth=recipe.data.prefetch))
        self.record = RunRecord(run, recipe, processes, self.state, console, began=began, peak=self.peak, stack=stack)
        self.evaluated: tuple[int, HeldOut] | None = None  # the last step that was, and how it was
        self.stops_early = self._no_longer_improves()
        self.health = self._health_check()
        stack.enter_context(hang_watch(run, processes.rank, recipe.health.hang_minutes))
        if self.step < recipe.steps and processes.first:
            (run / SUMMARY).unlink(missing_ok=True)  # of a run that had finished and now has more steps to go
        self.record.start()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    def go(self) -> Outcome:
        """Step after step to the end of the recipe, or until asked to stop."""
        if self._evaluation_missing():
            self._evaluate()
        while self.step < self.recipe.steps and not self.stops_early and not self._asked_to_stop():
            if not self._one_step():
                continue
            if self._evaluation_due():
                self._evaluate()
            if self._checkpoint_due():
                self._checkpoint()
        if self.state.saved_step < self.step:
            self._checkpoint()
        self.state.writer.wait()
        alive()
        if self.step == self.recipe.steps or self.stops_early:
            with suppress(ScoringStopped):
                return self._finish()
        return self._leave()

    def _one_step(self) -> bool:
        """The next step, recorded; False: the run went back on it."""
        self.record.begin_step()
        learning_rate = self._schedule()
        micro_batches, waited = self._next_batch()
        limit = self.health.limit()
        with self.record.profiled():
            result = train_step(
                self.state.model,
                self.state.optimizer,
                micro_batches,
                self.processes,
                max_grad_norm=self.recipe.optimizer.max_grad_norm,
                reduce_every=self.recipe.parallel.reduce == "every",
                loss_scale=self.state.loss_scale,
                loss_limit=limit if self.recipe.health.spike in ("skip", "rollback") else math.inf,
            )
        alive()
        self.state.count_step()
        self.record.step(result, learning_rate=learning_rate, waited=waited)
        samples, saved = list(self._samples(self.step - 1)), self.state.saved_step > 0
        cause = self.health.look_after(self.step, result, limit, micro_batches, samples, may_go_back=saved)
        if cause is not None:
            self._go_back(cause)
        return cause is None

    def _schedule(self) -> float:
        """Set the learning rate of the next step."""
        factor = learning_rate_factor(self.recipe.schedule, self.step, self.recipe.steps)
        learning_rate = self.recipe.optimizer.learning_rate * factor
        set_learning_rate(self.state.optimizer, learning_rate)
        return learning_rate

    def _next_batch(self) -> tuple[list[MicroBatch], float]:
        """This process's micro-batches of the next step, and the seconds that it waited for them."""
        asked = time.perf_counter()
        batches = self.batches.take(self.step)
        waited = time.perf_counter() - asked
        device, across = self.processes.device, self.recipe.data.across_documents
        length = length_at(self.recipe.data, self.step)
        return [MicroBatch.of(batch, device, across_documents=across, length=length) for batch in batches], waited

    def _read(self, step: int) -> list[Batch]:
        return [self.stream.batch(samples) for samples in self._samples(step)]

    def _samples(self, step: int) -> Iterator[range]:
        """This process's part of a step's samples."""
        first, size = self.state.position.first_sample(step), sequences_at(self.recipe.batch, step)
        rank, processes = self.processes.rank, self.processes.size
        return samples_of(first, size, rank=rank, processes=processes, micro_batch=self.recipe.batch.micro_batch)

    def _health_check(self) -> HealthCheck:
        tell, documents = self.record.tell, self.stream.documents
        return HealthCheck(self.run, self.recipe.health, self.processes, self.state.loss_scale, tell, documents)

    def _go_back(self, cause: str) -> None:
        """Go back to the newest checkpoint, in the record too; see `RunState.go_back`."""
        rollback = self.state.go_back(cause)
        self.evaluated = None
        self.record.roll_back()
        self.health = self._health_check()
        alive()
        self.record.tell(
            f"step {rollback.step}: {cause}; back to the checkpoint of step {rollback.to}, on from there with sample "
            f"{rollback.sample:,}"
        )

    def _evaluation_due(self) -> bool:
        every = self.recipe.evaluation.every
        return every > 0 and self.step % every == 0 and self.step < self.recipe.steps

    def _evaluation_missing(self) -> bool:
        """Whether the run came to its step without scoring it: it begins, or was asked to stop meanwhile."""
        due = self.step == 0 or self._evaluation_due()
        return due and not self.processes.first_decides(self.record.has_evaluation)

    def _evaluate(self) -> None:
        """Score some of the held-out text and record it, unless the run is asked to stop meanwhile."""
        with suppress(ScoringStopped):
            results = self._score(self.recipe.evaluation.windows)
            self.evaluated = (self.step, HeldOut(results[HELDOUT]["loss"], int(results[HELDOUT]["tokens"])))
            self.record.evaluation(results)
            self.stops_early = self._no_longer_improves()

    def _evaluate_all(self) -> dict[str, dict[str, float]]:
        """Score all held-out text and record it: with the averaged weights too, where they are kept."""
        results = self._score(windows=0)
        if self.state.average is not None:
            with self.state.average.in_the_model():
                results[HELDOUT_AVERAGED] = self._score(windows=0)[HELDOUT]
        self.record.evaluation(results)
        return results

    def _score(self, windows: int) -> dict[str, dict[str, float]]:
        return evaluate(
            self.state.model,
            self.heldout,
            self.processes,
            windows=windows,
            micro_batch=self.recipe.batch.micro_batch,
            byte_lengths=self.data.tokenizer.byte_lengths,
            across_documents=self.recipe.data.across_documents,
            stopped=self._asked_to_stop,
        )

    def _no_longer_improves(self) -> bool:
        """Whether the held-out loss says to stop; the first process, which keeps the record, decides for all."""
        if not self.recipe.evaluation.stop_after:
            return False
        return self.processes.first_decides(
            lambda: no_longer_improves(read_metrics(self.run / METRICS)[1], HELDOUT, self.recipe.evaluation)
        )

    def _checkpoint_due(self) -> bool:
        """Where steps are skipped, after the next good one: good checkpoints would make room for bad ones."""
        every = self.recipe.checkpoints.every
        passed = every > 0 and self.step // every > self.state.saved_step // every
        return passed and self.step < self.recipe.steps and not self.health.skipped

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        self.state.save(heldout=self.evaluated[1] if self.evaluated and self.evaluated[0] == self.step else None)
        self.record.checkpoint(time.perf_counter() - started)

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to; all of them then stop after the same step, as for a failed checkpoint."""
        requested, failed = self.processes.sum(self.interruption.requested, self.state.writer.failed)
        if failed:
            self.state.writer.wait()
        return requested > 0

    def _leave(self) -> Outcome:
        asked = self.processes.gather(self.interruption.told())
        self.record.leave_page()
        report = self.processes.first_decides(lambda: write_report(self.run))
        self.record.stop()
        kept = f"after step {self.step} with a checkpoint" if self.step else "before the first step"
        reason = next((f", {text}" for text in asked if text), "")
        self.record.tell(f"stopped {kept}{reason}; the same command goes on from there")
        self.record.tell(f"run directory  {self.run}\nreport         {report}")
        return Outcome("stopped", self.step, self.run, report)

    def _finish(self) -> Outcome:
        if self.stops_early:
            count = self.recipe.evaluation.stop_after
            self.record.tell(f"stopped early: no better held-out loss in {count} evaluations")
        self.record.tell("scoring all held-out text")
        results = self._evaluate_all()
        with not_watched():  # the first process compresses all held-out text, while the others wait
            report = self.processes.first_decides(lambda: self._conclude(results))
        return Outcome("finished", self.step, self.run, report)

    def _conclude(self, results: dict[str, dict[str, float]]) -> Path:
        """Write down and show what became of the run."""
        facts = finished_facts(
            self.run,
            self.recipe,
            self.data,
            results,
            step=self.step,
            tokens=self.state.position.first_sample(self.step) * self.recipe.data.sequence_length,
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            matmul_peak=self.peak,
            stopped_early=self.stops_early,
        )
        write_summary(self.run, facts)
        self.record.leave_page()
        report = write_report(self.run)
        self.record.stop()
        self.record.tell(closing_text(facts))
        self.record.tell(f"\nrun directory  {self.run}\nreport         {report}")
        return report
