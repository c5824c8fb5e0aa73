"""Stopping between steps when asked: Ctrl-C, the SIGTERM or SIGUSR1 of a cluster, the SIGHUP of a closed terminal.

Slurm sends SIGTERM before it takes a node away, and with ``--signal=USR1@300`` SIGUSR1 so many seconds before that. A
run leaves within the rest of its step, or of one batch of an evaluation, which is dropped and made up for when the run
goes on, and the writing of one checkpoint, and of the one in flight. ``torchrun`` passes
SIGUSR1 on only where ``--signals-to-handle`` names it, and ends its processes ``--shutdown-timeout`` seconds later, 30
if it is not told otherwise; where one of them has died, it ends the others with SIGTERM and 30 s, told what it may.

Python handles a signal in its main thread, between two instructions, so one that waits in a collective for ever never
does. The number of the signal goes down a pipe all the same, to a thread that has the hang watch hurry.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from tilewright.trainer.health.hang import hurry, no_hurry


class Interruption:
    """Within its ``with`` block, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP only asks to stop; a second SIGINT
    interrupts at once. One of them also has the process end where it makes no progress from then on; see `hurry`.

    Args:
        stop_seconds: for how long it may make none; 0: for ever.

    Attributes:
        requested: whether a stop was asked for.
        signal: the name of the signal that asked first, such as ``SIGUSR1``.
        time: when it came, in seconds of `time.monotonic`.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, stop_seconds: float = 0.0) -> None:
        self._stop_seconds = stop_seconds
        self.requested = False
        self.signal: str | None = None
        self.time = 0.0

    def __enter__(self) -> Interruption:
        # A signal that is ignored stays so: nohup ignores SIGHUP to outlive its terminal.
        asked = [number for number in self._SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._listener.start()
        self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._pipe)
        self._listener.join(1.0)  # a forked child may hold the pipe open
        no_hurry()

    def _listen(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in self._SIGNALS:
                    hurry(self._stop_seconds)

    def told(self) -> str | None:
        """Which signal asked, and how long ago; None if none did."""
        return f"{time.monotonic() - self.time:.1f} s after {self.signal}" if self.signal else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.signal, self.time = True, signal.Signals(number).name, time.monotonic()
