"""A run that hangs says where: after so long without a sign of life each process writes its stacks and ends.

The timer is a thread of the C library's that needs no interpreter lock, so it fires while the process waits inside a
collective or a kernel. When one process has ended, ``torchrun`` ends the others.
"""

from __future__ import annotations

import faulthandler
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass
class _Watch:
    """After how many seconds what is written where; `paused` while something may take as long as it takes."""

    seconds: float
    file: TextIO
    paused: bool = False


# faulthandler takes no time beyond some hundred years.
_LONGEST_SECONDS = 1e9
_watch: _Watch | None = None
_hurried = math.inf  # the limit that `hurry` set, also while no watch is on
_lock = threading.RLock()  # other threads tell that they are alive while the watch ends


@contextmanager
def hang_watch(run: Path, rank: int, minutes: float) -> Iterator[None]:
    """Within the ``with`` block, end the process where `alive` is not called for `minutes` (0: never).

    The stacks of all its threads go to ``hang-rank-N.txt`` in the run directory, and the exit status is 1. What an
    earlier process of the run left there is kept beside it, with the time at which it hung in its name.
    """
    global _watch
    path = run / f"hang-rank-{rank}.txt"
    with suppress(FileNotFoundError):
        if (left := path.stat()).st_size:
            path.rename(path.with_stem(f"{path.stem}-{left.st_mtime:.0f}"))
    with path.open("w", encoding="utf-8") as file:
        with _lock:
            _watch = _Watch(min(60 * minutes or math.inf, _hurried), file)
            alive()
        try:
            yield
        finally:
            with _lock:
                faulthandler.cancel_dump_traceback_later()
                _watch = None
            path.unlink(missing_ok=True)  # nothing has hung


@contextmanager
def not_watched() -> Iterator[None]:
    """Within the ``with`` block, which may take as long as it takes, no watch is on."""
    _pause(True)
    try:
        yield
    finally:
        _pause(False)


def hurry(seconds: float) -> None:
    """From now on, end the process already where `alive` is not called for `seconds` (0: as before).

    Holds for a watch that begins later, too, until `no_hurry`.
    """
    global _hurried
    with _lock:
        _hurried = min(_hurried, seconds or math.inf)
        if _watch is not None:
            _watch.seconds = min(_watch.seconds, _hurried)
            alive()


def no_hurry() -> None:
    """Have the watches that begin from now on wait for as long as they are told."""
    global _hurried
    _hurried = math.inf


def alive() -> None:
    """The process is getting on: start the time anew. Does nothing where no watch is on."""
    with _lock:
        if _watch is not None and not _watch.paused and _watch.seconds < math.inf:
            seconds = min(_watch.seconds, _LONGEST_SECONDS)
            faulthandler.dump_traceback_later(seconds, exit=True, file=_watch.file)


def _pause(paused: bool) -> None:
    with _lock:
        if _watch is not None:
            _watch.paused = paused
            faulthandler.cancel_dump_traceback_later()
            alive()
