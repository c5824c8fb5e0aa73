"""The health of a run: losses that stand out, and what is kept of a step that went wrong."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tilewright.trainer.recipe import Health
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
    random numbers.

    Args:
        step: that was skipped, counted from 1.
        samples: the global sample indices of each micro-batch.
        documents: the names of those that a sample reads from.
    """
    folder = run / INCIDENTS / f"step-{step:08d}"
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


def _text(number: float) -> float | str:
    """A number as JSON has it; nan and inf as text, which it has no number for."""
    return number if math.isfinite(number) else str(number)
