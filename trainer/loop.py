"""The loop: next batch → micro-batches forward and backward → clip → step → record → evaluate → checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tilewright.corpus import Batch, MixtureStream, Prefetch, TrainStream
from tilewright.trainer.checkpoints import checkpoint
from tilewright.trainer.checkpoints.identity import keep_identity, restore_identity
from tilewright.trainer.data import (
    CORPUS,
    HELDOUT,
    HELDOUT_AVERAGED,
    TrainingData,
    check_same_data,
    is_same_data,
    open_data,
    samples_of,
)
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.evaluate import evaluate
from tilewright.trainer.health.check import HealthCheck
from tilewright.trainer.health.early_stopping import no_longer_improves
from tilewright.trainer.health.hang import alive, hang_watch, not_watched
from tilewright.trainer.health.interruption import Interruption
from tilewright.trainer.health.rollback import Rollback, Rollbacks
from tilewright.trainer.held_memory import held_bytes
from tilewright.trainer.optimization.averaging import AVERAGE, WeightAverage
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.optimization.optimizer import build_optimizer, set_learning_rate
from tilewright.trainer.optimization.schedule import learning_rate_factor
from tilewright.trainer.parallel.float8 import check_float8, check_torchao, generation_of
from tilewright.trainer.parallel.peers import ended_with_the_others
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.parallel.waiting import SlowRanks
from tilewright.trainer.peak import measured_matmul_peak, peak_memory_bytes
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.display import Display, NullDisplay
from tilewright.trainer.record.environment import environment
from tilewright.trainer.record.metrics import METRICS, Metrics, TrainingLine, read_metrics
from tilewright.trainer.record.observation import Observation
from tilewright.trainer.record.quantities import gigabytes
from tilewright.trainer.record.report import write_report
from tilewright.trainer.record.summary import closing_text, finished_facts, write_summary
from tilewright.trainer.record.tracking import check_installed
from tilewright.trainer.run_directory import SUMMARY, choose_run_directory, locked, save_recipe, write_atomically
from tilewright.trainer.stages import SAMPLE, DataPosition, check_batches, length_at, sequences_at, step_text
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
    """Choose and lock the run directory, and record in it what the run is made of."""
    check_installed(recipe.tracking)
    run = choose_run_directory(recipe, lambda run: is_same_data(run, data))
    stack.enter_context(locked(run))
    restore_identity(run, recipe)
    check_same_data(run, data)
    for done in checkpoint.committed(run, recipe.checkpoints.folder)[-1:]:
        if done.step > recipe.steps:
            raise TrainingError(
                f"steps is {recipe.steps}, and {run} has come to step {done.step} already; raise steps, or name "
                "another --run_directory"
            )
        if done.step < recipe.steps:
            (run / SUMMARY).unlink(missing_ok=True)  # of a run that had finished and now has more steps to go
    save_recipe(run, recipe)
    write_atomically(run / CORPUS, json.dumps(data.identity(), indent=1))
    keep_identity(run, recipe)
    return run


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
        self.processes, self.interruption, self.stack = processes, interruption, stack
        self.heldout = data.heldout_streams(sequence_length=recipe.data.sequence_length)
        dtype = getattr(torch, recipe.compute_dtype)
        # All processes measure at the same time, as they will compute.
        (self.peak,) = processes.sum(measured_matmul_peak(processes.device, dtype))
        self.model = sharded_model(
            recipe.model,
            processes,
            compute_dtype=dtype,
            compile=recipe.compile,
            seed=recipe.seed,
            parallel=recipe.parallel,
            activation_checkpointing=recipe.activation_checkpointing,
            float8=recipe.float8,
        )
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.loss_scale = LossScale(processes.device) if recipe.compute_dtype == "float16" else None
        decay = recipe.optimizer.ema_decay
        self.average = WeightAverage(self.model, decay) if decay else None
        self.writer = stack.enter_context(checkpoint.CheckpointWriter(run, processes, recipe.checkpoints))
        self.step, self.position, self.averaged_from = 0, DataPosition(recipe.batch), 0
        self._resume()
        self.rollbacks = Rollbacks(run, processes, step=self.step, most=recipe.health.rollbacks)
        if (sample := self.rollbacks.first_sample(self.step)) is not None:
            self.position.go_on(self.step, sample)
        self.saved_step = self.step
        self.checkpoint_seconds: dict[str, float] = {}
        self.batches = stack.enter_context(Prefetch(self._read, first=self.step, depth=recipe.data.prefetch))
        self.evaluated: tuple[int, float] | None = None  # the last step that was, and its held-out loss
        self.metrics: Metrics | None = None
        self.display: Display = stack.enter_context(Display(console)) if processes.first else NullDisplay()
        self.observation = Observation(
            run,
            recipe,
            processes,
            self.model,
            self.optimizer,
            self.average,
            step=self.step,
            began=began,
            peak=self.peak,
            tell=self.display.message,
            stack=stack,
        )
        if processes.first:
            write_atomically(run / "environment.json", json.dumps(environment(processes.device), indent=1))
            if self.step == 0 and (run / METRICS).exists():
                # Killed before its first checkpoint, or its checkpoints are gone: what it recorded is kept.
                (run / METRICS).replace(run / "metrics-before.jsonl")
            self.metrics = Metrics(run, resume_step=self.step, send=self.observation.send)
            stack.callback(self.metrics.close)
        self.stops_early = self._no_longer_improves()
        self.health = self._health_check()
        self.slow_ranks = SlowRanks(
            self.model,
            shards=processes.size // recipe.parallel.replicas,
            share=recipe.health.slow_rank,
            gather=processes.gather,
            tell=self.display.message,
        )
        stack.enter_context(hang_watch(run, processes.rank, recipe.health.hang_minutes))
        self.display.start(recipe.name, recipe.steps, self.step, self._facts())

    def go(self) -> Outcome:
        """Step after step to the end of the recipe, or until asked to stop."""
        if self.step == 0:
            self._evaluate(self.recipe.evaluation.windows)
        while self.step < self.recipe.steps and not self.stops_early and not self._asked_to_stop():
            if not self._one_step():
                continue
            last = self.step == self.recipe.steps
            if _due(self.step, self.recipe.evaluation.every) and not last:
                self._evaluate(self.recipe.evaluation.windows)
                self.stops_early = self._no_longer_improves()
            # Where steps are skipped, after the next good one: good checkpoints would make room for bad ones.
            every = self.recipe.checkpoints.every
            if every and self.step // every > self.saved_step // every and not last and not self.health.skipped:
                self._checkpoint()
        if self.saved_step < self.step:
            self._checkpoint()
        self.writer.wait()
        alive()
        return self._finish() if self.step == self.recipe.steps or self.stops_early else self._leave()

    def _one_step(self) -> bool:
        """The next step, recorded; False: the run went back on it."""
        started, checkpoint_in_flight = time.perf_counter(), self.writer.in_flight
        self.slow_ranks.begin_step()
        learning_rate = self.recipe.optimizer.learning_rate * learning_rate_factor(
            self.recipe.schedule, self.step, self.recipe.steps
        )
        set_learning_rate(self.optimizer, learning_rate)
        asked = time.perf_counter()
        batches = self.batches.take(self.step)
        waited = time.perf_counter() - asked
        length, limit = length_at(self.recipe.data, self.step), self.health.limit()
        micro_batches = [self._micro_batch(batch, length) for batch in batches]
        with self.observation.profiled(self.step + 1):
            result = train_step(
                self.model,
                self.optimizer,
                micro_batches,
                self.processes,
                max_grad_norm=self.recipe.optimizer.max_grad_norm,
                reduce_every=self.recipe.parallel.reduce == "every",
                loss_scale=self.loss_scale,
                loss_limit=limit if self.recipe.health.spike in ("skip", "rollback") else math.inf,
            )
        self.step += 1
        alive()
        if self.average is not None:
            self.average.update(self.step)  # after a skipped step too: its formula counts them all
        tokens = self.recipe.data.sequence_length
        first, after = self.position.first_sample(self.step - 1), self.position.first_sample(self.step)
        seconds = time.perf_counter() - started
        rate = (after - first) * tokens / seconds
        line: TrainingLine = {
            "step": self.step,
            "loss": result.loss,
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": after * tokens,
            "sample": first,
            "sequences": after - first,
            "sequence_length": length,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(self.processes.device),
            "data_wait": waited / seconds,
            "checkpoint_in_flight": checkpoint_in_flight,
            "grad_norms": result.grad_norms,
            "seconds": {"data": waited, **result.seconds, **self.checkpoint_seconds},
            "skipped": not result.stepped,
            **self.observation.figures(
                self.step, tokens=after * tokens, rate=rate, length=length, alone=not checkpoint_in_flight
            ),
            **self.slow_ranks.of_step(seconds),
        }
        self.checkpoint_seconds = {}
        if self.metrics is not None:
            self.metrics.train(**line)
        self.display.step(**line)
        samples, saved = list(self._samples(self.step - 1)), self.saved_step > 0
        cause = self.health.look_after(self.step, result, limit, micro_batches, samples, may_go_back=saved)
        if cause is not None:
            self._go_back(cause)
        return cause is None

    def _health_check(self) -> HealthCheck:
        tell, documents = self.display.message, self.stream.documents
        return HealthCheck(self.run, self.recipe.health, self.processes, self.loss_scale, tell, documents)

    def _go_back(self, cause: str) -> None:
        """Go back to the newest checkpoint, and on from there with the samples after those of this step."""
        self.writer.wait()
        alive()
        # The one that this process knows of, not what a listing has, which may lag behind.
        newest = checkpoint.checkpoint_of(
            checkpoint.checkpoint_folder(self.run, self.recipe.checkpoints.folder), self.saved_step
        )
        step, sample = self.step, self.position.first_sample(self.step)
        self.rollbacks.add(Rollback(step, newest.step, sample, cause))
        self._load(newest)
        self.position.go_on(self.step, sample)
        self.saved_step, self.evaluated = self.step, None
        if self.metrics is not None:
            self.metrics.roll_back(self.step)
        self.health = self._health_check()
        alive()
        self.display.message(
            f"step {step}: {cause}; back to the checkpoint of step {self.step}, on from there with sample {sample:,}"
        )

    def _read(self, step: int) -> list[Batch]:
        return [self.stream.batch(samples) for samples in self._samples(step)]

    def _samples(self, step: int) -> Iterator[range]:
        """This process's part of a step's samples."""
        first, size = self.position.first_sample(step), sequences_at(self.recipe.batch, step)
        rank, processes = self.processes.rank, self.processes.size
        return samples_of(first, size, rank=rank, processes=processes, micro_batch=self.recipe.batch.micro_batch)

    def _micro_batch(self, batch: Batch, length: int) -> MicroBatch:
        across = self.recipe.data.across_documents
        return MicroBatch.of(batch, self.processes.device, across_documents=across, length=length)

    def _evaluate(self, windows: int, *, averaged: bool = False) -> dict[str, dict[str, float]]:
        """Score the held-out text and record it; `averaged`: with the averaged weights too, where they are kept."""
        results = self._score(windows)
        if averaged and self.average is not None:
            with self.average.in_the_model():
                results[HELDOUT_AVERAGED] = self._score(windows)[HELDOUT]
        self.evaluated = (self.step, results[HELDOUT]["loss"])
        if self.metrics is not None:
            self.metrics.evaluation(self.step, results)
        self.display.evaluation(self.step, results)
        self.observation.update_page()
        return results

    def _score(self, windows: int) -> dict[str, dict[str, float]]:
        return evaluate(
            self.model,
            self.heldout,
            self.processes,
            windows=windows,
            micro_batch=self.recipe.batch.micro_batch,
            byte_lengths=self.data.tokenizer.byte_lengths,
            across_documents=self.recipe.data.across_documents,
        )

    def _no_longer_improves(self) -> bool:
        """Whether the held-out loss says to stop; the first process, which keeps the record, decides for all."""
        if not self.recipe.evaluation.stop_after:
            return False
        return self.processes.first_decides(
            lambda: no_longer_improves(read_metrics(self.run / METRICS)[1], HELDOUT, self.recipe.evaluation)
        )

    def _state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint."""
        state = checkpoint.training_state(self.model, self.optimizer) | self.position.state(self.step)
        for part in (self.average, self.loss_scale):
            state |= part.state() if part is not None else {}
        return state

    def _resume(self) -> None:
        """Go on from the newest committed checkpoint; from the beginning where there is none."""
        folder = self.recipe.checkpoints.folder
        for newest in self.processes.first_decides(lambda: checkpoint.committed(self.run, folder)[-1:]):
            self._load(newest)

    def _load(self, saved: checkpoint.Committed) -> None:
        missing = checkpoint.load(saved, self._state(), self.processes, optional=(SAMPLE, AVERAGE))
        self.step = saved.step
        self.position.loaded(self.step, stored=SAMPLE not in missing)
        if self.average is not None and self.average.state().keys() <= missing:
            self.average.begin()
            self.averaged_from = self.step

    def _checkpoint(self) -> None:
        started = time.perf_counter()
        state = self._state()
        loss = self.evaluated[1] if self.evaluated and self.evaluated[0] == self.step else None
        alive()
        self.writer.save(state, self.step, heldout_loss=loss)
        alive()
        self.saved_step = self.step
        self.checkpoint_seconds = {"checkpoint": time.perf_counter() - started}
        self.observation.update_page()

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to; all of them then stop after the same step, as for a failed checkpoint."""
        requested, failed = self.processes.sum(self.interruption.requested, self.writer.failed)
        if failed:
            self.writer.wait()
        return requested > 0

    def _facts(self) -> dict[str, str]:
        parameters = sum(p.numel() for p in self.model.parameters())
        facts = {
            "model": f"{parameters / 1e6:.1f}M parameters, {self.recipe.compute_dtype}",
            "step": step_text(self.recipe, self.step),
            "held": self._held_text(parameters),
            "matmul peak": f"{self.peak / 1e12:.2f} TFLOP/s, measured now",
            "run": str(self.run),
            **self.observation.where(),
        }
        if self.processes.size > 1:
            facts["processes"] = str(self.processes.size)
        if self.step:
            facts["resumed"] = f"after step {self.step}"
        if self.averaged_from:
            facts["averaged"] = f"weights from those of step {self.averaged_from} on: no average was kept before"
        return facts

    def _held_text(self, parameters: int) -> str:
        """What this process holds between steps, beside what its share should be."""
        held = held_bytes(self.model, self.optimizer)
        shards = self.processes.size // self.recipe.parallel.replicas
        per_parameter = sum(held.values()) * shards / parameters
        kinds = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in held.items())
        return f"{kinds} a process: {per_parameter:.2f} bytes x parameters / {shards}"

    def _leave(self) -> Outcome:
        asked = self.processes.gather(self.interruption.told())
        self.observation.leave_page()
        report = self.processes.first_decides(lambda: write_report(self.run))
        self.display.stop()
        kept = f"after step {self.step} with a checkpoint" if self.step else "before the first step"
        reason = next((f", {text}" for text in asked if text), "")
        self.display.message(f"stopped {kept}{reason}; the same command goes on from there")
        self.display.message(f"run directory  {self.run}\nreport         {report}")
        return Outcome("stopped", self.step, self.run, report)

    def _finish(self) -> Outcome:
        if self.stops_early:
            count = self.recipe.evaluation.stop_after
            self.display.message(f"stopped early: no better held-out loss in {count} evaluations")
        self.display.message("scoring all held-out text")
        results = self._evaluate(windows=0, averaged=True)
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
            tokens=self.position.first_sample(self.step) * self.recipe.data.sequence_length,
            parameters=sum(p.numel() for p in self.model.parameters()),
            matmul_peak=self.peak,
            stopped_early=self.stops_early,
        )
        write_summary(self.run, facts)
        self.observation.leave_page()
        report = write_report(self.run)
        self.display.stop()
        self.display.message(closing_text(facts))
        self.display.message(f"\nrun directory  {self.run}\nreport         {report}")
        return report


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
