"""Stopping between steps when asked: Ctrl-C, the SIGTERM that a cluster sends, the SIGHUP of a closed terminal."""

from __future__ import annotations

import signal
from types import FrameType


class Interruption:
    """Within its ``with`` block, the first SIGINT, SIGTERM or SIGHUP only asks to stop; a second SIGINT
    interrupts at once.

    Attributes:
        requested: whether a stop was asked for.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        # A signal that is ignored stays so: nohup ignores SIGHUP to outlive its terminal.
        asked = [number for number in self._SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
