"""When a run was started and gone on with, so that its throughput can be told with all pauses counted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tilewright.trainer.run_directory import write_atomically

STARTS = "starts.jsonl"


class WallClock:
    """The time since a run first began, in the process that records it.

    Each start adds a line to ``starts.jsonl``: `time` (Unix seconds), the `step` that it goes on from, and `processes`.

    Args:
        run: its directory.
        step: where this start goes on; 0 at the beginning.
        processes: of this start.
        now: the time, in Unix seconds.
    """

    def __init__(self, run: Path, *, step: int, processes: int, now: float | None = None) -> None:
        start = {"time": time.time() if now is None else now, "step": step, "processes": processes}
        starts = [*read_starts(run), start]
        write_atomically(run / STARTS, "".join(json.dumps(start) + "\n" for start in starts))
        first = starts[0]
        # A run of before there was such a file: when it began is not known.
        self._began: float | None = first["time"] if first["step"] == 0 else None

    def rate(self, tokens: int, now: float | None = None) -> float | None:
        """Tokens a second since the run first began, everything counted: start-up and compilation, evaluations and
        checkpoints, steps that a crash lost and that were taken again, and the time between a stop and the next start.

        Args:
            tokens: trained on so far, over all processes and restarts; each step's count once.
            now: the time, in Unix seconds.

        Returns:
            None where it is not known when the run began.
        """
        if self._began is None:
            return None
        return tokens / max((time.time() if now is None else now) - self._began, 1e-9)


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order, without those whose line a crash tore; none where there is no file."""
    try:
        lines = (run / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [start for start in map(_parsed, lines) if start is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    numbers = isinstance(line, dict) and all(isinstance(line.get(key), (int, float)) for key in ("time", "step"))
    return line if numbers else None
