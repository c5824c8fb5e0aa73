"""The steps of one place (`grid.py`), measured in processes of their own, so that nothing is left over from another.

One model serves all settings of a mode of activation checkpointing: ``torch.compiler.set_stance`` runs its compiled
blocks eagerly.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from tilewright.benchmarks.allocations import peak_bytes
from tilewright.benchmarks.measure import interleaved
from tilewright.benchmarks.peaks import measured_peaks, name_of
from tilewright.benchmarks.training.grid import Place, Setting
from tilewright.benchmarks.training.workload import Workload, disagreement
from tilewright.cli.clone import command_of
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe import ActivationCheckpointing
from tilewright.trainer.step import StepResult

WARM_UP = 2
OUT_OF_MEMORY = "out of memory"


@dataclass
class Measured:
    """One setting of a place; `refused` says why it was not timed.

    Attributes:
        seconds: of each round.
        compile_seconds: what the first step took longer than the median; None where nothing is compiled.
        peak_memory_bytes: of one process at most, weights and optimizer state included.
        peak_flops: matrix products of all processes together at best; None where that is unknown.
    """

    setting: Setting
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None
    peak_memory_bytes: int | None = None
    loss: float = math.nan
    peak_flops: float | None = None
    refused: str = ""


def measure(place: Place, rounds: int, device_type: str) -> list[Measured]:
    """Measure a place in fresh processes, under torchrun where there are several.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        TrainingError: the processes failed; the end of what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "steps.json"
        command = command_of("training.steps", json.dumps(place), str(rounds), str(output))
        if place.world_size > 1:
            runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
            command = [*runner, f"--nproc-per-node={place.world_size}", *command]
        # Nothing is compiled yet, whatever was compiled for another place.
        surroundings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        if device_type == "cpu":
            surroundings["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
        if done.returncode or not output.is_file():
            raise TrainingError(f"the steps of {place} failed:\n{done.stderr.strip()[-2000:]}")
        return [Measured(**{**row, "setting": Setting(*row["setting"])}) for row in json.loads(output.read_text())]


def main() -> None:
    """One of the processes of a place: the place as JSON, rounds, and the file that the first process writes."""
    model, sequence_length, world_size, settings = json.loads(sys.argv[1])
    place = Place(model, sequence_length, world_size, tuple(Setting(*setting) for setting in settings))
    with world() as processes:
        rows = measure_here(place, processes, int(sys.argv[2]))
        if processes.first:
            Path(sys.argv[3]).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def measure_here(place: Place, processes: World, rounds: int) -> list[Measured]:
    """Measure all settings of a place, `rounds` times each, on these processes."""
    recipe = place.recipe
    rows = {str(number): Measured(setting) for number, setting in enumerate(place.settings)}
    workloads: dict[str, Workload] = {}
    for setting in place.settings:
        mode = setting.checkpointing
        if mode not in workloads:
            with_mode = replace(recipe, activation_checkpointing=ActivationCheckpointing(mode))
            workloads[mode] = Workload.of(with_mode, processes)
    runs = {name: _Run(workloads[row.setting.checkpointing], row.setting) for name, row in rows.items()}
    first_seconds = _first_steps(rows, runs, recipe.compute_dtype)
    kept = {name: run for name, run in runs.items() if not rows[name].refused}
    for name, run in kept.items():
        (everywhere,) = processes.sum(run.workload.state_bytes() + peak_bytes(run.step, processes.device))
        rows[name].peak_memory_bytes = round(everywhere / processes.size)
    peak = _matmul_peak(processes, getattr(torch, recipe.compute_dtype))
    for name, seconds in interleaved({name: run.step for name, run in kept.items()}, rounds).items():
        rows[name].seconds, rows[name].peak_flops = seconds, peak
        if rows[name].setting.compile:
            rows[name].compile_seconds = max(first_seconds[name] - statistics.median(seconds), 0.0)
    return list(rows.values())


@dataclass(frozen=True)
class _Run:
    """A workload in one setting."""

    workload: Workload
    setting: Setting

    def step(self) -> StepResult:
        with contextlib.ExitStack() as stack:
            if self.workload.recipe.compile and not self.setting.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return self.workload.step(self.setting.micro_batch, self.setting.sequences)


def _first_steps(rows: dict[str, Measured], runs: dict[str, _Run], compute_dtype: str) -> dict[str, float]:
    """Warm every setting up and refuse those that do not compute what others do; seconds of each one's first step."""
    seconds: dict[str, float] = {}
    # By the number of sequences: what the first setting that takes so many computes.
    expected: dict[int, StepResult] = {}
    for name, run in runs.items():
        started = time.perf_counter()
        try:
            result = run.step()
            seconds[name] = time.perf_counter() - started
            rows[name].loss = result.loss
            right = expected.setdefault(run.setting.sequences, result)
            rows[name].refused = disagreement(result, right, compute_dtype)
            for _ in range(WARM_UP - 1):
                run.step()
        except torch.OutOfMemoryError:
            if run.workload.world.size > 1:
                raise  # the others are waiting in a collective that this process will never reach
            rows[name].refused = OUT_OF_MEMORY
            run.workload.optimizer.zero_grad(set_to_none=True)
        gc.collect()
    return seconds


def _matmul_peak(processes: World, dtype: torch.dtype) -> float | None:
    """FLOP/s of all processes at once, as they compute; None where a device's peak is unknown."""
    mine = measured_peaks(processes.device, (dtype,)).flops_per_second.get(name_of(dtype))
    known, total = processes.sum(mine is not None, mine or 0.0)
    return total if known == processes.size else None
