"""The report page while a run goes on, written by a process of its own so that training does not wait for its plots."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record.report import SECONDS_BETWEEN_PAGES, write_report


class LiveReport:
    """Keeps `report.html` of a run up to date; nothing that goes wrong with it reaches the run.

    Args:
        run: its directory.
        clock: seconds, from any origin.
        start: starts a command and returns without waiting for it.
    """

    def __init__(
        self,
        run: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[list[str]], subprocess.Popen[bytes]] | None = None,
    ) -> None:
        self._run, self._clock, self._start = run, clock, start or _start
        self._written = clock()
        self._process: subprocess.Popen[bytes] | None = None

    def update(self) -> None:
        """Have the page written anew, if the last time is two minutes ago and that writing has come to its end."""
        if self._clock() - self._written < SECONDS_BETWEEN_PAGES or (self._process and self._process.poll() is None):
            return
        self._written = self._clock()
        try:
            self._process = self._start([sys.executable, "-m", "tilewright.trainer.record.live_report", str(self._run)])
        except OSError:
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None and self._process is not None:
            # Nothing else will say on the page that the run has ended; and what ended it is what is to be told.
            with suppress(Exception):
                write_report(self._run)

    def stop(self) -> None:
        """Write no more: the page that is written at the end must be the last one."""
        self._written = float("inf")
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # Off the GPUs, on one thread, behind the training in the queue for a core, and out of the reach of a Ctrl-C.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["nice", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _main() -> int:
    try:
        write_report(Path(sys.argv[1]), running=True)
    except TrainingError:
        return 1  # told, if it still holds, when the run ends
    return 0


if __name__ == "__main__":
    sys.exit(_main())
