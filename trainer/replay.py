"""One step of a run again, in one process, with a look at what it is made of: ``tilewright replay RUN --step N``.

The newest checkpoint before the step is loaded and the steps from there on are taken again, so the step meets the
weights and samples that it met in the run, whatever the number of processes then. The run directory is only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.shards import local
from tilewright.model import Transformer
from tilewright.trainer.build import build
from tilewright.trainer.checkpoints import checkpoint
from tilewright.trainer.data import check_same_data, open_data, samples_of
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.health.check import INCIDENTS
from tilewright.trainer.optimization.optimizer import set_learning_rate
from tilewright.trainer.parallel.float8 import check_float8, generation_of
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe import Parallel, Recipe
from tilewright.trainer.recipe.file import recipe_from_run
from tilewright.trainer.record.metrics import METRICS, ROLLED_BACK, read_metrics
from tilewright.trainer.run_directory import RECIPE
from tilewright.trainer.step import MicroBatch, StepResult, train_step
from tilewright.trainer.trained import check_kernels, check_vocabulary


@dataclass(frozen=True)
class Replayed:
    """A step taken again.

    Attributes:
        step: counted from 1.
        recorded: its line in `metrics.jsonl`.
        result: what came of it now.
        micro_batches: the global samples of each and its mean loss, nats a token.
        not_finite: parameters whose gradient is not.
    """

    step: int
    recorded: dict[str, object]
    result: StepResult
    micro_batches: list[tuple[range, float]]
    not_finite: list[str]


def replay(run: Path, step: int, say: Callable[[str], None]) -> Replayed:
    """Take step `step` of `run` again.

    Args:
        say: told of progress, a line at a time.

    Raises:
        TrainingError, CorpusError: the run has not taken that step or went back on it, or it, its data or its
            checkpoint is damaged.
    """
    recipe = recipe_from_run(run / RECIPE)
    lines = _recorded_lines(run, step, say)
    with world() as process:
        if process.size > 1:
            raise TrainingError(f"replay runs in one process, and there are {process.size}; start it without torchrun")
        check_kernels(process.device, getattr(torch, recipe.compute_dtype))
        check_float8(recipe.float8, generation_of(process.device))
        replaying = _Replaying(recipe, run, process, lines)
        first = replaying.start(step)
        for needed in range(first, step):
            if needed not in lines:
                raise TrainingError(
                    f"step {step} cannot be taken again: the newest checkpoint before it is "
                    f"{f'of step {first - 1}' if first > 1 else 'none'}, and {run / METRICS} holds no step {needed} of "
                    "those between; name with --step one that comes soon after a checkpoint"
                )
        for earlier in range(first, step):
            say(f"step {earlier} again, on the way to {step}")
            replaying.take(earlier, replaying.optimizer)
        look = _Look(replaying.model)
        result, micro_batches = replaying.take(step, look)
        return Replayed(step, lines[step], result, micro_batches, look.not_finite)


def _recorded_lines(run: Path, step: int, say: Callable[[str], None]) -> dict[int, dict[str, Any]]:
    """The training lines of the run by their step; that of `step` is among them."""
    lines = {line["step"]: line for line in read_metrics(run / METRICS)[0]}
    known = f"{min(lines)} to {max(lines)}" if lines else "none"
    rolled_back = run / ROLLED_BACK
    gone_back_on = rolled_back.is_file() and step in {line["step"] for line in read_metrics(rolled_back)[0]}
    where = f"what was recorded of it is in {rolled_back}"
    if (incident := run / INCIDENTS / f"step-{step:08d}").is_dir():
        where += f", what it worked on in {incident}"
    if step in lines and gone_back_on:
        say(f"step {step} as the run went on; it was taken before and rolled back: {where}")
    elif gone_back_on:
        raise TrainingError(
            f"{run} went back on its step {step}, which cannot be taken again; {where}; or name with --step one that "
            f"was kept ({known})"
        )
    elif step not in lines:
        raise TrainingError(f"{run} has recorded no step {step}; its steps are {known}: name one of them with --step")
    return lines


class _Replaying:
    """A run put together again in one process."""

    def __init__(self, recipe: Recipe, run: Path, process: World, lines: dict[int, dict[str, Any]]) -> None:
        self.recipe, self.run, self.process, self.lines = recipe, run, process, lines
        data = open_data(recipe.data)
        check_vocabulary(recipe, data)
        check_same_data(run, data)
        self.stream = data.train_stream(sequence_length=recipe.data.sequence_length, seed=recipe.seed)
        self.model, self.optimizer, self.loss_scale = build(replace(recipe, parallel=Parallel()), process)

    def start(self, step: int) -> int:
        """Load the newest checkpoint before `step`; returns the step that comes after it."""
        folder = self.recipe.checkpoints.folder
        there = checkpoint.seen_by_the_first(lambda: checkpoint.committed(self.run, folder), None)
        before = [kept for kept in there if kept.step < step]
        if not before:
            return 1  # the initial values, which the model has
        state = checkpoint.training_state(self.model, self.optimizer)
        checkpoint.load(before[-1], state | (self.loss_scale.state() if self.loss_scale else {}))
        return before[-1].step + 1

    def take(self, step: int, optimizer: torch.optim.Optimizer) -> tuple[StepResult, list[tuple[range, float]]]:
        """One step with `optimizer`; its result, and the samples and mean loss of each micro-batch."""
        recipe, line = self.recipe, self.lines[step]
        # Whatever the recipe says by now: the record says what was; one without samples is of a run without stages.
        set_learning_rate(self.optimizer, line["lr"])
        sequences = line.get("sequences", recipe.batch.sequences)
        first, length = line.get("sample", (step - 1) * sequences), line.get("sequence_length")
        samples = list(samples_of(first, sequences, rank=0, processes=1, micro_batch=recipe.batch.micro_batch))
        across = recipe.data.across_documents
        micros = [
            MicroBatch.of(self.stream.batch(part), self.process.device, across_documents=across, length=length)
            for part in samples
        ]
        result = train_step(
            self.model,
            optimizer,
            micros,
            self.process,
            max_grad_norm=0.0 if isinstance(optimizer, _Look) else recipe.optimizer.max_grad_norm,
            loss_scale=self.loss_scale,
            # What the run skipped is skipped again, for whatever reason it was.
            loss_limit=-math.inf if line.get("skipped") else math.inf,
        )
        losses = [
            float(loss) / max(micro.valid_tokens(), 1) for loss, micro in zip(result.micro_losses, micros, strict=True)
        ]
        return result, list(zip(samples, losses, strict=True))


class _Look(torch.optim.Optimizer):
    """Looks at the gradients and changes nothing."""

    _step_supports_amp_scaling = True  # or a step that is to be skipped would not come here

    def __init__(self, model: Transformer) -> None:
        super().__init__(model.parameters(), {})
        self._model = model
        self.not_finite: list[str] = []

    def step(self) -> None:  # type: ignore[override]
        """Find what is not finite."""
        for name, parameter in self._model.named_parameters():
            if parameter.grad is None:
                continue
            if not local(parameter.grad).isfinite().all():
                self.not_finite.append(name)


def replayed_text(replayed: Replayed) -> str:
    """The step for the terminal."""
    recorded, result = replayed.recorded, replayed.result
    lines = [
        f"step {replayed.step}   now: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}   "
        f"recorded: loss {_number(recorded.get('loss'))}, gradient norm {_number(recorded.get('grad_norm'))}",
        "",
        "samples                        loss, nats a token",
    ]
    lines += [f"  {part.start:>12,} to {part.stop - 1:>12,}  {loss:.6g}" for part, loss in replayed.micro_batches]
    lines += ["", "gradient norm, before clipping"]
    lines += [f"  {place:<24} {norm:.6g}" for place, norm in result.grad_norms.items()]
    if replayed.not_finite:
        lines += ["", "not finite: " + ", ".join(replayed.not_finite)]
    return "\n".join(lines)


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "not finite"
