"""What is seen of a run beside what it computes: memory by kind, utilisation, profiles, trackers, the live page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from tilewright.trainer.optimization.averaging import WeightAverage
from tilewright.trainer.parallel.activations import recomputed_flops_per_token
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.live_report import LiveReport
from tilewright.trainer.record.profiling import StepProfiler
from tilewright.trainer.record.starts import WallClock
from tilewright.trainer.record.step_memory import StepMemory
from tilewright.trainer.record.tracking import Trackers


class Observed(TypedDict):
    """Fields of a `TrainingLine`, which describes them."""

    mfu: float
    hfu: float | None
    tokens_per_second_since_start: float | None
    memory: dict[str, int | None]
    profiled: bool


class Observation:
    """Looks at a run, in each of its processes.

    Args:
        run: its directory.
        step: the one that it goes on from; 0 at the beginning.
        began: when this start of it began, in Unix seconds.
        peak: matrix-product FLOP/s of all processes.
        tell: shows a line to the user.
        stack: holds what must be closed at the end of the run.

    Raises:
        TrainingError: a tracker cannot be opened for a new run; the same on all processes.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        processes: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        *,
        step: int,
        began: float,
        peak: float,
        tell: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self._recipe, self._peak, self._device = recipe, peak, processes.device
        self._memory = StepMemory(model, optimizer, average, processes.device)
        self._profiler = StepProfiler(run, recipe.profile, processes, tell)
        self._trackers: Trackers | None = None
        self._clock: WallClock | None = None
        self._page: LiveReport | None = None

        def open_records() -> Path:
            self._clock = WallClock(run, step=step, processes=processes.size, now=began)
            self._trackers = stack.enter_context(Trackers(run, recipe, resumed=step > 0, tell=tell))
            self._page = stack.enter_context(LiveReport(run))
            return run

        processes.first_decides(open_records)

    def profiled(self, step: int) -> AbstractContextManager[None]:
        """A context for the work of `step`, counted from 1, which is profiled where the recipe says so."""
        return self._profiler.around(step)

    def figures(self, step: int, *, tokens: int, rate: float, length: int, alone: bool) -> Observed:
        """What there is to record of the step that has ended.

        Args:
            step: counted from 1.
            tokens: read for training so far.
            rate: tokens a second of this step.
            length: of its sequences.
            alone: whether no checkpoint was being written meanwhile.
        """
        profiled = self._profiler.includes(step)
        model = self._recipe.model.flops_per_token(length)
        again = recomputed_flops_per_token(
            self._recipe.activation_checkpointing,
            self._recipe.model,
            length,
            compiled=self._recipe.compile,
            device_type=self._device.type,
        )
        return {
            "mfu": rate * model / self._peak,
            "hfu": None if again is None else rate * (model + again) / self._peak,
            "tokens_per_second_since_start": self._clock.rate(tokens) if self._clock else None,
            "memory": self._memory.of_step(alone=alone and not profiled),
            "profiled": profiled,
        }

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Have figures of a step sent to the trackers."""
        if self._trackers is not None:
            self._trackers.send(values, step)

    def where(self) -> dict[str, str]:
        """Where the run can be looked at elsewhere, by the tracker's name."""
        return self._trackers.where() if self._trackers else {}

    def update_page(self) -> None:
        """Have the report page follow the run."""
        if self._page is not None:
            self._page.update()

    def leave_page(self) -> None:
        """The page that is written now stays."""
        if self._page is not None:
            self._page.stop()
