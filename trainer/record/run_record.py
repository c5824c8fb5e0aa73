"""What is written down and shown of a run while it goes: its metrics, the display, and what looks at its steps."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from rich.console import Console

from tilewright.trainer.checkpoints.run_state import RunState
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.parallel.waiting import SlowRanks
from tilewright.trainer.peak import peak_memory_bytes
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.display import Display, NullDisplay
from tilewright.trainer.record.environment import environment
from tilewright.trainer.record.metrics import METRICS, Metrics, TrainingLine
from tilewright.trainer.record.observation import Observation
from tilewright.trainer.record.opening import opening_facts
from tilewright.trainer.run_directory import write_atomically
from tilewright.trainer.stages import length_at
from tilewright.trainer.step import StepResult


class RunRecord:
    """The record of a run, made and called alike by each of its processes; the first one keeps and shows it.

    Args:
        run: its directory.
        state: as it goes on from; the record follows it.
        began: when this start of the run began, in Unix seconds.
        peak: matrix-product FLOP/s of all processes.
        stack: holds what must be closed at the end of the run.

    Attributes:
        tell: shows a line to the user.

    Raises:
        TrainingError: here and in every method, a file cannot be written; here, a tracker cannot be opened.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        processes: World,
        state: RunState,
        console: Console,
        *,
        began: float,
        peak: float,
        stack: ExitStack,
    ) -> None:
        self._run, self._recipe, self._processes, self._state, self._peak = run, recipe, processes, state, peak
        self._display: Display = stack.enter_context(Display(console)) if processes.first else NullDisplay()
        self.tell = self._display.message
        self._observation = Observation(
            run,
            recipe,
            processes,
            state.model,
            state.optimizer,
            state.average,
            step=state.step,
            began=began,
            peak=peak,
            tell=self.tell,
            stack=stack,
        )
        self._metrics = self._open_metrics(stack) if processes.first else None
        self._slow_ranks = SlowRanks(
            state.model,
            shards=processes.size // recipe.parallel.replicas,
            share=recipe.health.slow_rank,
            gather=processes.gather,
            tell=self.tell,
        )
        self._started, self._checkpoint_in_flight = 0.0, False  # of the step that `begin_step` begins
        self._checkpoint_seconds: dict[str, float] = {}

    def start(self) -> None:
        """Show what the run is; the first step comes next."""
        facts = opening_facts(
            self._recipe,
            self._state,
            self._run,
            processes=self._processes.size,
            matmul_peak=self._peak,
            elsewhere=self._observation.where(),
        )
        self._display.start(self._recipe.name, self._recipe.steps, self._state.step, facts)

    def begin_step(self) -> None:
        """A step begins, and with it its time."""
        self._started, self._checkpoint_in_flight = time.perf_counter(), self._state.writer.in_flight
        self._slow_ranks.begin_step()

    def profiled(self) -> AbstractContextManager[None]:
        """A context for the work of the step that has begun, which is profiled where the recipe says so."""
        return self._observation.profiled(self._state.step + 1)

    def step(self, result: StepResult, *, learning_rate: float, waited: float) -> None:
        """The step that began is over, and counted.

        Args:
            learning_rate: that it used.
            waited: seconds of it, for its batch.
        """
        step, whole = self._state.step, self._recipe.data.sequence_length
        first, after = self._state.position.first_sample(step - 1), self._state.position.first_sample(step)
        length, in_flight = length_at(self._recipe.data, step - 1), self._checkpoint_in_flight
        seconds = time.perf_counter() - self._started
        tokens, rate = after * whole, (after - first) * whole / seconds
        line: TrainingLine = {
            "step": step,
            "loss": result.loss,
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            "sample": first,
            "sequences": after - first,
            "sequence_length": length,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(self._processes.device),
            "data_wait": waited / seconds,
            "checkpoint_in_flight": in_flight,
            "grad_norms": result.grad_norms,
            "seconds": {"data": waited, **result.seconds, **self._checkpoint_seconds},
            "skipped": not result.stepped,
            **self._observation.figures(step, tokens=tokens, rate=rate, length=length, alone=not in_flight),
            **self._slow_ranks.of_step(seconds),
        }
        self._checkpoint_seconds = {}
        if self._metrics is not None:
            self._metrics.train(**line)
        self._display.step(**line)

    def evaluation(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """The held-out text was scored after the last step; `results` by name, see `Metrics.evaluation`."""
        if self._metrics is not None:
            self._metrics.evaluation(self._state.step, results)
        self._display.evaluation(self._state.step, results)
        self._observation.update_page()

    def has_evaluation(self) -> bool:
        """On the first process: whether one is recorded after the last step."""
        return self._metrics is not None and self._metrics.has_evaluation(self._state.step)

    def checkpoint(self, seconds: float) -> None:
        """A checkpoint was taken, which kept training for `seconds`."""
        self._checkpoint_seconds = {"checkpoint": seconds}
        self._observation.update_page()

    def roll_back(self) -> None:
        """The run has gone back to the step that its state says."""
        if self._metrics is not None:
            self._metrics.roll_back(self._state.step)

    def leave_page(self) -> None:
        """The report page that is written now stays."""
        self._observation.leave_page()

    def stop(self) -> None:
        """No step comes any more; lines can still be shown."""
        self._display.stop()

    def _open_metrics(self, stack: ExitStack) -> Metrics:
        """The metrics, beside what the run is made on."""
        write_atomically(self._run / "environment.json", json.dumps(environment(self._processes.device), indent=1))
        path = self._run / METRICS
        if self._state.step == 0 and path.exists():
            # Killed before its first checkpoint, or its checkpoints are gone: what it recorded is kept.
            with path.with_name("metrics-before.jsonl").open("ab") as before, path.open("rb") as recorded:
                shutil.copyfileobj(recorded, before)
            path.unlink()
        metrics = Metrics(self._run, resume_step=self._state.step, send=self._observation.send)
        stack.callback(metrics.close)
        return metrics
