"""Stopping between steps when asked: Ctrl-C, the SIGTERM or SIGUSR1 of a cluster, the SIGHUP of a closed terminal.

Slurm sends SIGTERM before it takes a node away, and with ``--signal=USR1@300`` SIGUSR1 so many seconds before that. A
run leaves within the rest of its step and the writing of one checkpoint, and of the one in flight. ``torchrun`` passes
SIGUSR1 on only where ``--signals-to-handle`` names it, and ends its processes ``--shutdown-timeout`` seconds later, 30
if it is not told otherwise.
"""

from __future__ import annotations

import signal
import time
from types import FrameType


class Interruption:
    """Within its ``with`` block, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP only asks to stop; a second SIGINT
    interrupts at once.

    Attributes:
        requested: whether a stop was asked for.
        signal: the name of the signal that asked first, such as ``SIGUSR1``.
        time: when it came, in seconds of `time.monotonic`.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self.signal: str | None = None
        self.time = 0.0

    def __enter__(self) -> Interruption:
        # A signal that is ignored stays so: nohup ignores SIGHUP to outlive its terminal.
        asked = [number for number in self._SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def told(self) -> str | None:
        """Which signal asked, and how long ago; None if none did."""
        return f"{time.monotonic() - self.time:.1f} s after {self.signal}" if self.signal else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.signal, self.time = True, signal.Signals(number).name, time.monotonic()
