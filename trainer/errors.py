"""The exception of the trainer, and how a launcher hears of it."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress


class TrainingError(Exception):
    """What a user can mend: the message is one sentence that names the cause and what to do about it.

    The command line prints the message alone and exits with status 2.
    """


class AnotherProcessEnded(TrainingError):
    """The run cannot go on because another of its processes has ended, of whom only that much is known here.

    Args:
        rank: which, where that is known.
        silent: whether it is its machine that is no longer heard of, so that nobody knows of an end.
    """

    def __init__(self, rank: int | None = None, *, silent: bool = False) -> None:
        which = "another process" if rank is None else f"process {rank}"
        ended = "ended first; its own message says why"
        gone = "no longer answers, nor does its machine; look whether that has lost its power or its network"
        super().__init__(f"{which} of this run {gone if silent else ended}")


def tell_launcher(reason: str) -> None:
    """Leave the reason why this process fails where ``torchrun`` looks for it, to show it among its own last lines.

    Does nothing without ``torchrun``. The file is that of `torch.distributed.elastic.multiprocessing.errors`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(told, file)


def disk_error_text(error: OSError) -> str:
    """One sentence for a file that could not be read or written."""
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}; mend that, then give the same command again"
