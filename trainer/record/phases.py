"""Where the time of a step goes: forward, backward, the reduction of gradients that nothing overlaps, optimizer."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable

import torch


class PhaseClock:
    """Times phases that follow one another. On a GPU they are timed where they run, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, phase: str) -> None:
        """End the phase before, and begin `phase`; one that has been there before goes on."""
        if self._device.type != "cuda":
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((phase, event))

    def insert(self, marks: Iterable[tuple[str, float | torch.cuda.Event]]) -> None:
        """Phases that have begun since the last one did, with the times at which they did."""
        self._marks += marks

    def seconds(self) -> dict[str, float]:
        """End the last phase; the seconds of each, once the device has come so far."""
        self.begin("")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            if isinstance(start, float):
                assert isinstance(end, float)
                spent[phase] += end - start
            else:
                assert not isinstance(end, float)
                spent[phase] += start.elapsed_time(end) / 1e3
        return dict(spent)
