"""A run that hangs says where: after so long without a sign of life each process writes its stacks and ends.

The timer is a thread of the C library's that needs no interpreter lock, so it fires while the process waits inside a
collective or a kernel. When one process has ended, ``torchrun`` ends the others.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_armed: tuple[float, TextIO] | None = None


@contextmanager
def hang_watch(run: Path, rank: int, minutes: float) -> Iterator[None]:
    """Within the ``with`` block, end the process where `alive` is not called for `minutes` (0: never).

    The stacks of all its threads go to ``hang-rank-N.txt`` in the run directory, and the exit status is 1. What an
    earlier process of the run left there is kept beside it, with the time at which it hung in its name.
    """
    global _armed
    if not minutes:
        yield
        return
    path = run / f"hang-rank-{rank}.txt"
    with suppress(FileNotFoundError):
        if (left := path.stat()).st_size:
            path.rename(path.with_stem(f"{path.stem}-{left.st_mtime:.0f}"))
    with path.open("w", encoding="utf-8") as file:
        _armed = (60 * minutes, file)
        try:
            alive()
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _armed = None
            path.unlink(missing_ok=True)  # nothing has hung


@contextmanager
def not_watched() -> Iterator[None]:
    """Within the ``with`` block, which may take as long as it takes, no watch is on."""
    global _armed
    armed, _armed = _armed, None
    faulthandler.cancel_dump_traceback_later()
    try:
        yield
    finally:
        _armed = armed
        alive()


def alive() -> None:
    """The process is getting on: start the time anew. Does nothing where no watch is on."""
    if _armed is not None:
        seconds, file = _armed
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
