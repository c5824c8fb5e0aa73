"""The loop: next batch → micro-batches forward and backward → clip → step → record → evaluate → checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tilewright.corpus import Corpus, HeldOutStream, TrainStream, open_corpus
from tilewright.trainer import checkpoint
from tilewright.trainer.display import Display, NullDisplay
from tilewright.trainer.environment import environment
from tilewright.trainer.evaluate import evaluate
from tilewright.trainer.interruption import Interruption
from tilewright.trainer.metrics import METRICS, Metrics, TrainingLine, read_metrics
from tilewright.trainer.optimizer import build_optimizer, set_learning_rate
from tilewright.trainer.parallel import World, check_batch, sharded_model, world
from tilewright.trainer.peak import measured_matmul_peak, peak_memory_bytes
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.report import write_report
from tilewright.trainer.run_directory import choose_run_directory, locked, save_recipe, write_atomically
from tilewright.trainer.schedule import learning_rate_factor
from tilewright.trainer.step import MicroBatch, train_step
from tilewright.trainer.summary import closing_text, compressed_bits_per_byte, continuation, heldout_text, write_summary
from tilewright.trainer.trained import (
    CORPUS,
    check_kernels,
    check_same_corpus,
    check_vocabulary,
    corpus_identity,
    is_same_corpus,
)

HELDOUT = "heldout"


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
    with world() as processes, ExitStack() as stack:
        check_batch(recipe.batch.sequences, recipe.batch.micro_batch, processes.size)
        check_kernels(processes.device, getattr(torch, recipe.compute_dtype))
        corpus = open_corpus(recipe.data.corpus)
        check_vocabulary(recipe, corpus)
        stream = TrainStream(corpus.train, sequence_length=recipe.data.sequence_length, seed=recipe.seed)
        run = processes.first_decides(lambda: _open_run(recipe, corpus, stack))
        interruption = stack.enter_context(Interruption())
        return _Training(recipe, corpus, stream, run, processes, interruption, console, stack).go()


def _open_run(recipe: Recipe, corpus: Corpus, stack: ExitStack) -> Path:
    """Choose and lock the run directory, and record in it what the run is made of."""
    run = choose_run_directory(recipe, lambda run: is_same_corpus(run, corpus))
    stack.enter_context(locked(run))
    check_same_corpus(run, corpus)
    save_recipe(run, recipe)
    write_atomically(run / CORPUS, json.dumps(corpus_identity(corpus), indent=1))
    return run


class _Training:
    """One run in the making: its parts, put together once."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        stream: TrainStream,
        run: Path,
        processes: World,
        interruption: Interruption,
        console: Console,
        stack: ExitStack,
    ) -> None:
        self.recipe, self.corpus, self.stream, self.run = recipe, corpus, stream, run
        self.processes, self.interruption, self.stack = processes, interruption, stack
        self.heldout = HeldOutStream(corpus.heldout, sequence_length=recipe.data.sequence_length)
        dtype = getattr(torch, recipe.compute_dtype)
        # All processes measure at the same time, as they will compute.
        (self.peak,) = processes.sum(measured_matmul_peak(processes.device, dtype))
        self.model = sharded_model(
            recipe.model, processes, compute_dtype=dtype, compile=recipe.compile, seed=recipe.seed
        )
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.step = self._resume()
        self.saved_step = self.step
        self.metrics: Metrics | None = None
        self.display: Display = NullDisplay()
        if processes.first:
            write_atomically(run / "environment.json", json.dumps(environment(processes.device), indent=1))
            if self.step == 0 and (run / METRICS).exists():
                # Killed before its first checkpoint, or its checkpoints are gone: what it recorded is kept.
                (run / METRICS).replace(run / "metrics-before.jsonl")
            self.metrics = Metrics(run, resume_step=self.step)
            stack.callback(self.metrics.close)
            self.display = stack.enter_context(Display(console))
        self.display.start(recipe.name, recipe.steps, self.step, self._facts())

    def go(self) -> Outcome:
        """Step after step to the end of the recipe, or until asked to stop."""
        if self.step == 0:
            self._evaluate(self.recipe.evaluation.windows)
        while self.step < self.recipe.steps and not self._asked_to_stop():
            self._one_step()
            last = self.step == self.recipe.steps
            if _due(self.step, self.recipe.evaluation.every) and not last:
                self._evaluate(self.recipe.evaluation.windows)
            if _due(self.step, self.recipe.checkpoints.every) and not last:
                self._checkpoint()
        if self.saved_step < self.step:
            self._checkpoint()
        return self._finish() if self.step == self.recipe.steps else self._leave()

    def _one_step(self) -> None:
        started = time.perf_counter()
        learning_rate = self.recipe.optimizer.learning_rate * learning_rate_factor(
            self.recipe.schedule, self.step, self.recipe.steps
        )
        set_learning_rate(self.optimizer, learning_rate)
        result = train_step(
            self.model,
            self.optimizer,
            list(self._micro_batches()),
            self.processes,
            max_grad_norm=self.recipe.optimizer.max_grad_norm,
        )
        self.step += 1
        tokens = self.recipe.tokens_per_step()
        rate = tokens / (time.perf_counter() - started)
        line: TrainingLine = {
            "step": self.step,
            "loss": result.loss,
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": self.step * tokens,
            "tokens_per_second": rate,
            "mfu": rate * self.recipe.model.flops_per_token(self.recipe.data.sequence_length) / self.peak,
            "peak_memory_bytes": peak_memory_bytes(self.processes.device),
        }
        if self.metrics is not None:
            self.metrics.train(**line)
        self.display.step(**line)

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process's part of the step's samples, the step's samples being [step · G, (step + 1) · G)."""
        share = self.recipe.batch.sequences // self.processes.size
        first = self.step * self.recipe.batch.sequences + self.processes.rank * share
        for start in range(first, first + share, self.recipe.batch.micro_batch):
            batch = self.stream.batch(range(start, start + self.recipe.batch.micro_batch))
            yield MicroBatch.of(batch, self.processes.device, across_documents=self.recipe.data.across_documents)

    def _evaluate(self, windows: int) -> dict[str, float]:
        result = evaluate(
            self.model,
            self.heldout,
            self.processes,
            windows=windows,
            micro_batch=self.recipe.batch.micro_batch,
            byte_lengths=self.corpus.tokenizer.byte_lengths,
            across_documents=self.recipe.data.across_documents,
        )
        if self.metrics is not None:
            self.metrics.evaluation(self.step, {HELDOUT: result})
        self.display.evaluation(self.step, {HELDOUT: result})
        return result

    def _resume(self) -> int:
        """The step of the newest committed checkpoint, loaded; 0 where there is none."""
        checkpoints = checkpoint.committed(self.run)
        if not checkpoints:
            return 0
        checkpoint.load(checkpoints[-1], checkpoint.training_state(self.model, self.optimizer), self.processes)
        return checkpoints[-1].step

    def _checkpoint(self) -> None:
        state = checkpoint.training_state(self.model, self.optimizer)
        checkpoint.save(state, self.run, self.step, self.processes, keep=self.recipe.checkpoints.keep)
        self.saved_step = self.step

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to; all of them then stop after the same step."""
        return self.processes.sum(self.interruption.requested) != [0.0]

    def _facts(self) -> dict[str, str]:
        parameters = sum(p.numel() for p in self.model.parameters())
        facts = {
            "model": f"{parameters / 1e6:.1f}M parameters, {self.recipe.compute_dtype}",
            "step": f"{self.recipe.tokens_per_step():,} tokens",
            "matmul peak": f"{self.peak / 1e12:.2f} TFLOP/s, measured now",
            "run": str(self.run),
        }
        if self.processes.size > 1:
            facts["processes"] = str(self.processes.size)
        if self.step:
            facts["resumed"] = f"after step {self.step}"
        return facts

    def _leave(self) -> Outcome:
        report = self.processes.first_decides(lambda: write_report(self.run))
        self.display.stop()
        kept = f"after step {self.step} with a checkpoint" if self.step else "before the first step"
        self.display.message(f"stopped {kept}; the same command goes on from there")
        self.display.message(f"run directory  {self.run}\nreport         {report}")
        return Outcome("stopped", self.step, self.run, report)

    def _finish(self) -> Outcome:
        self.display.message("scoring all held-out text")
        result = self._evaluate(windows=0)
        report = self.processes.first_decides(lambda: self._conclude(result))
        return Outcome("finished", self.step, self.run, report)

    def _conclude(self, result: dict[str, float]) -> Path:
        """Write down and show what became of the run."""
        text = heldout_text(Path(self.recipe.data.corpus))
        heldout = {**result, **compressed_bits_per_byte(text), "bytes": len(text)}
        facts = {
            "name": self.recipe.name,
            "status": "finished",
            "steps": self.step,
            "tokens": self.step * self.recipe.tokens_per_step(),
            "seconds": seconds_in_steps(self.run, self.recipe.tokens_per_step()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "matmul_peak_flops": self.peak,
            "heldout": heldout,
            "sample": continuation(self.run, self.recipe),
        }
        write_summary(self.run, facts)
        report = write_report(self.run)
        self.display.stop()
        self.display.message(closing_text(facts))
        self.display.message(f"\nrun directory  {self.run}\nreport         {report}")
        return report


def seconds_in_steps(run: Path, tokens_per_step: int) -> float:
    """The time that a run's optimizer steps took, over all its resumptions; evaluation and pauses not counted."""
    steps, _ = read_metrics(run / METRICS)
    return float(sum(tokens_per_step / line["tokens_per_second"] for line in steps if line.get("tokens_per_second")))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
