"""PyTorch's profiler and memory snapshots for the steps that a recipe names, into ``profile/`` of the run directory.

``profile/step-00000010/rank-0.trace.json.gz`` is a trace for https://ui.perfetto.dev or ``chrome://tracing``,
``rank-0.ops.txt`` its operators by time, and on a GPU ``rank-0.memory.pickle`` what was allocated when and from where,
for https://pytorch.org/memory_viz.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Profile

PROFILES = "profile"
_OPS = 40  # rows of the table
_MEMORY_EVENTS = 200_000  # allocations and frees that a snapshot can hold


class StepProfiler:
    """Profiles the steps that the recipe names, in each of the processes that it names.

    Args:
        run: its directory.
        tell: shows a line to the user.
    """

    def __init__(self, run: Path, recipe: Profile, processes: World, tell: Callable[[str], None]) -> None:
        self._run, self._recipe, self._tell = run, recipe, tell
        self._rank, self._device = processes.rank, processes.device
        self._here = not recipe.ranks or processes.rank in recipe.ranks
        if recipe.steps and recipe.memory and self._device.type != "cuda":
            tell("profile.memory: a memory snapshot needs a GPU; the traces have each allocation on the CPU instead")

    def includes(self, step: int) -> bool:
        """Whether `step`, counted from 1, is profiled, here or in another process, which the others then wait for."""
        return step in self._recipe.steps

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profile the ``with`` block where it is the work of a step that the recipe names.

        A profile that cannot be written is told and otherwise left alone.
        """
        if not (self.includes(step) and self._here):
            yield
            return
        on_gpu = self._device.type == "cuda"
        snapshot = on_gpu and self._recipe.memory
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        try:
            with profile(activities=activities, record_shapes=True, profile_memory=self._recipe.memory) as profiler:
                yield
                if on_gpu:
                    torch.cuda.synchronize(self._device)
            self._write(step, profiler, snapshot)
        finally:
            if snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, step: int, profiler: profile, snapshot: bool) -> None:
        folder = self._run / PROFILES / f"step-{step:08d}"
        name = f"rank-{self._rank}"
        by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
            table = profiler.key_averages().table(sort_by=by, row_limit=_OPS)
            (folder / f"{name}.ops.txt").write_text(table, encoding="utf-8")
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            self._tell(f"step {step} was profiled, and its profile could not be written: {error}")
            return
        self._tell(f"step {step} profiled: {folder} (its trace opens in https://ui.perfetto.dev)")
