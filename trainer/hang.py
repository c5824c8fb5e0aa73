"""A run that hangs says where: after so long without a sign of life each process writes its stacks and ends.

The timer is a thread of the C library's that needs no interpreter lock, so it fires while the process waits inside a
collective or a kernel. When one process has ended, ``torchrun`` ends the others.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_armed: tuple[float, TextIO] | None = None


@contextmanager
def hang_watch(run: Path, rank: int, minutes: float) -> Iterator[None]:
    """Within the ``with`` block, end the process where `alive` is not called for `minutes` (0: never).

    The stacks of all its threads go to ``hang-rank-N.txt`` in the run directory, and the exit status is 1.
    """
    global _armed
    if not minutes:
        yield
        return
    path = run / f"hang-rank-{rank}.txt"
    with path.open("w", encoding="utf-8") as file:
        _armed = (60 * minutes, file)
        try:
            alive()
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _armed = None
    path.unlink(missing_ok=True)  # nothing has hung


def alive() -> None:
    """The process is getting on: start the time anew. Does nothing where no watch is on."""
    if _armed is not None:
        seconds, file = _armed
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
