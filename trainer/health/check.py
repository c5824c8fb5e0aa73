"""The health of a run: losses that stand out, what is done about a step that went wrong, and what is kept of it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewright.corpus import CorpusError
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Health
from tilewright.trainer.record.metrics import METRICS, read_metrics
from tilewright.trainer.run_directory import write_atomically
from tilewright.trainer.step import MicroBatch, StepResult

INCIDENTS = "incidents"
# The standard deviation of a normal distribution over its median absolute deviation.
_NORMAL = 1.4826


class LossWatch:
    """Says from the last losses which one would be a spike:

        loss > median + spike_score · 1.4826 · median absolute deviation

    Neither of the two medians moves with a few outliers (Iglewicz and Hoaglin, How to Detect and Handle Outliers,
    1993). Losses of skipped steps do not count.
    """

    def __init__(self, recipe: Health, losses: Iterable[float] = ()) -> None:
        self._recipe = recipe
        self._losses = deque(losses, recipe.spike_window)

    def add(self, loss: float) -> None:
        """Count the loss of a step that was taken."""
        self._losses.append(loss)

    def limit(self) -> float:
        """The largest loss, in nats a token, that is no spike; infinite while there are too few to tell."""
        if self._recipe.spike == "none" or len(self._losses) * 4 < self._recipe.spike_window:
            return math.inf
        middle = statistics.median(self._losses)
        spread = statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self._recipe.spike_score * _NORMAL * spread


class HealthCheck:
    """Looks at every step of a run, in each of its processes.

    Args:
        run: its directory, whose record says which steps went before.
        loss_scale: of float16.
        tell: shows a line to the user.
        documents: the names of those that a sample reads from.

    Attributes:
        skipped: steps that were skipped in a row, up to the last one.
    """

    def __init__(
        self,
        run: Path,
        recipe: Health,
        processes: World,
        loss_scale: LossScale | None,
        tell: Callable[[str], None],
        documents: Callable[[int], list[str]],
    ) -> None:
        self._run, self._recipe, self._rank = run, recipe, processes.rank
        self._loss_scale, self._tell, self._documents = loss_scale, tell, documents

        def recent() -> tuple[list[float], int]:
            lines = read_metrics(run / METRICS)[0] if (run / METRICS).is_file() else []
            return _recent(lines, recipe.spike_window, scaled=loss_scale is not None)

        losses, self.skipped = processes.first_decides(recent)
        self._losses = LossWatch(recipe, losses)

    def limit(self) -> float:
        """The largest loss, in nats a token, that the next step may have without being a spike."""
        return self._losses.limit()

    def look_after(
        self,
        step: int,
        result: StepResult,
        limit: float,
        micro_batches: list[MicroBatch],
        samples: list[range],
        *,
        may_go_back: bool,
    ) -> str | None:
        """Tell of a step that stands out, keep what one that was skipped worked on, and end after too many of those.

        Args:
            step: counted from 1.
            limit: what `limit` said before the step.
            samples: of each micro-batch.
            may_go_back: whether there is a checkpoint to go back to.

        Returns:
            Why the run is to go back, where the recipe has it do that.

        Raises:
            TrainingError: ``health.bad_steps`` in a row were skipped.
        """
        if result.stepped:
            self._losses.add(result.loss)
            self.skipped = 0
            if result.loss > limit:
                self._tell(f"step {step}: the loss is {result.loss:.4g}, a spike above {limit:.4g}")
            return None
        if result.overflowed:
            assert self._loss_scale is not None
            scale = self._loss_scale.scale.item()
            self._tell(f"step {step} skipped: a float16 gradient overflowed; the loss scale is now {scale:g}")
            return None
        self.skipped += 1
        spike, cause = math.isfinite(result.grad_norm), f"the gradient's norm is {result.grad_norm}"
        if spike:
            cause = f"the loss is {result.loss:.4g}, a spike above {limit:.4g}"
        self._tell(f"step {step} skipped: {cause}; {self._keep(step, result, micro_batches, samples)}")
        too_many = self.skipped >= self._recipe.bad_steps
        if self._recipe.spike == "rollback" and may_go_back and (spike or too_many):
            return cause
        if too_many:
            raise TrainingError(
                f"training diverged: {cause}; {self.skipped} steps in a row were skipped (health.bad_steps); the "
                "checkpoints are untouched; start another run with a lower optimizer.learning_rate or a longer "
                "schedule.warmup_steps"
            )
        return None

    def _keep(self, step: int, result: StepResult, micro_batches: list[MicroBatch], samples: list[range]) -> str:
        """Keep what a skipped step worked on; says where, or why it could not be, which is nothing to end a run for."""
        try:
            folder = save_incident(self._run, step, self._rank, result, micro_batches, samples, self._documents)
        except (OSError, RuntimeError, CorpusError) as error:  # a disk that fills ends torch.save in a RuntimeError
            return f"what it worked on could not be kept: {error}"
        return f"what it worked on is in {folder}"


def _recent(lines: list[dict[str, Any]], window: int, *, scaled: bool) -> tuple[list[float], int]:
    """The losses of the last `window` steps that were taken, and how many were skipped since."""
    taken = [line["loss"] for line in lines if not line.get("skipped") and line["loss"] is not None]
    # A float16 gradient that overflowed under a finite loss was the scale's doing.
    counted = [
        bool(line.get("skipped"))
        for line in lines
        if not (line.get("skipped") and scaled and line["grad_norm"] is None and line["loss"] is not None)
    ]
    return taken[-window:], sum(itertools.takewhile(bool, reversed(counted)))


def save_incident(
    run: Path,
    step: int,
    rank: int,
    result: StepResult,
    micro_batches: Sequence[MicroBatch],
    samples: Sequence[range],
    documents: Callable[[int], list[str]],
) -> Path:
    """Keep what a step that was skipped had to work on, for a look at it later; each process keeps its own part.

    ``incidents/step-00000012/rank-0.json`` says which samples, documents and losses each micro-batch had;
    ``rank-0.pt`` holds the tensors of those whose loss is not finite (of all, where each one is) and the state of the
    random numbers. A run that went back and came to the same step with other samples keeps those in
    ``step-00000012-2``.

    Args:
        step: that was skipped, counted from 1.
        samples: the global sample indices of each micro-batch.
        documents: the names of those that a sample reads from.
    """
    folder = _incident_folder(run, step, rank, samples)
    folder.mkdir(parents=True, exist_ok=True)
    losses = [
        float(loss) / max(micro.valid_tokens(), 1)
        for loss, micro in zip(result.micro_losses, micro_batches, strict=True)
    ]
    broken = [number for number, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
    facts = {
        "step": step,
        "rank": rank,
        "loss": _text(result.loss),
        "grad_norm": _text(result.grad_norm),
        "micro_batches": [
            {
                "samples": [part.start, part.stop],
                "loss": _text(loss),
                "documents": {sample: documents(sample) for sample in part},
            }
            for part, loss in zip(samples, losses, strict=True)
        ],
        "kept": list(broken),
    }
    tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    for number in broken:
        micro = micro_batches[number]
        parts = {"inputs": micro.inputs, "targets": micro.targets, "cu_seqlens": micro.cu_seqlens}
        tensors |= {f"{number}.{name}": x.cpu() for name, x in parts.items() if x is not None}
    torch.save(tensors, folder / f"rank-{rank}.pt")
    write_atomically(folder / f"rank-{rank}.json", json.dumps(facts, indent=1))
    return folder


def _incident_folder(run: Path, step: int, rank: int, samples: Sequence[range]) -> Path:
    """Where an incident of a step is kept: not in place of one of other samples."""
    first = run / INCIDENTS / f"step-{step:08d}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    mine = [[part.start, part.stop] for part in samples]
    return next(
        folder
        for folder in itertools.chain([first], others)
        if _samples_kept(folder / f"rank-{rank}.json") in (None, mine)
    )


def _samples_kept(facts: Path) -> list[list[int]] | None:
    """The samples of each micro-batch of an incident; None where there is none, or half of one."""
    try:
        return [part["samples"] for part in json.loads(facts.read_text(encoding="utf-8"))["micro_batches"]]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _text(number: float) -> float | str:
    """A number as JSON has it; nan and inf as text, which it has no number for."""
    return number if math.isfinite(number) else str(number)
