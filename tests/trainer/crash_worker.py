"""Starts the processes of training runs and has them killed, or worse, where a test says; run by `test_crash`.

Each line of standard input asks for one life of a run:

    {"arguments": ["train", …], "processes": 2, "log": FILE, "fault": null, or
        {"rank": 1, "point": a name in POINTS, "call": 3, "what": a name in FAULTS, "all": whether all die if one does},
        or {"rank": 0, "seconds": 1.5, "all": true}, which kills}

and is answered, when all of its processes have ended, by the status of each: negative for the signal that ended it.
The processes are forked from this one, which has imported everything, so that a life takes a second and not ten.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem
from object_store import ObjectStore  # beside this script

from tilewright.cli.main import main
from tilewright.kernels import AdamW
from tilewright.trainer import loop
from tilewright.trainer.checkpoints import files as checkpoint_files
from tilewright.trainer.checkpoints import storage
from tilewright.trainer.checkpoints import writer as checkpoint_writer
from tilewright.trainer.parallel import sharding as parallel
from tilewright.trainer.record import metrics

# What the others have to notice that one has died. A launcher ends them at once; here they are left to it, but for
# those that still wait for a dead one to come up, which cannot notice.
NOTICE_SECONDS, LEAVE_SECONDS = 5.0, 60.0


def before(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """A point reached whenever `owner.name` is about to be called."""

    def arm(reached: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            reached()
            return original(*args, **options)

        setattr(owner, name, wrapped)

    return arm


def after(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """A point reached whenever `owner.name` has done its work."""

    def arm(reached: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            reached()
            return result

        setattr(owner, name, wrapped)

    return arm


def in_the_copy(reached: Callable[[], None]) -> None:
    original = checkpoint_writer.staged

    def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        original(dict(list(state.items())[: len(state) // 2]))
        reached()
        return original(state)

    checkpoint_writer.staged = wrapped


def in_a_metrics_line(reached: Callable[[], None]) -> None:
    original = metrics.Metrics._write

    def wrapped(self: metrics.Metrics, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        position = self._file.tell()
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        reached()
        self._file.seek(position)
        self._file.truncate()
        original(self, line)

    metrics.Metrics._write = wrapped  # type: ignore[method-assign]


def in_the_removal_of_an_old_checkpoint(reached: Callable[[], None]) -> None:
    original = storage.shutil.rmtree

    def wrapped(path: Path, *args: Any, **options: Any) -> None:
        files = sorted(Path(path).glob("*.distcp"))
        if files:
            files[0].unlink()
            reached()
        original(path, *args, **options)

    storage.shutil.rmtree = wrapped  # type: ignore[assignment]


# What a process is doing when it reaches each point, and how to have it notice.
POINTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "before a group is made": before(parallel.dist, "new_group"),
    "before an all-reduce": before(parallel.dist, "all_reduce"),
    "before the optimizer step": before(AdamW, "step"),
    "after the optimizer step": after(AdamW, "step"),
    "in a line of metrics": in_a_metrics_line,
    "in the copy": in_the_copy,
    "in a file of tensors": before(dcp_filesystem, "_write_item"),
    "before a sync": before(os, "fsync"),
    "before a file is verified": before(checkpoint_files.hashlib, "file_digest"),
    "between writing and the commit": before(checkpoint_writer, "commit"),
    "in the commit": before(Path, "replace"),
    "after the commit": after(checkpoint_writer, "commit"),
    "in the removal of an old checkpoint": in_the_removal_of_an_old_checkpoint,
    "before an object is there": before(ObjectStore, "appear"),
    "before an object is removed": before(ObjectStore, "rm_file"),
}


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# What befalls a process at a point.
FAULTS: dict[str, Callable[[], None]] = {
    "SIGKILL": functools.partial(signal.raise_signal, signal.SIGKILL),
    "SIGTERM": functools.partial(signal.raise_signal, signal.SIGTERM),
    "SIGUSR1": functools.partial(signal.raise_signal, signal.SIGUSR1),
    "disk full": disk_full,
}


def arm(fault: dict[str, Any]) -> None:
    """Have `fault` befall this process."""
    if "seconds" in fault:
        signal.setitimer(signal.ITIMER_REAL, fault["seconds"])  # its signal ends a process that does not handle it
        return
    calls = 0

    def reached() -> None:
        nonlocal calls
        calls += 1
        if calls == fault["call"]:
            FAULTS[fault["what"]]()

    POINTS[fault["point"]](reached)


def child(life: dict[str, Any], rank: int, port: int) -> None:
    """One process of a run; does not return."""
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life["processes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Neither has to do with checkpoints, and together they take longer than the steps.
    loop.measured_matmul_peak = lambda device, dtype: 1e12
    loop.write_report = lambda run: run / "report.html"
    if life["fault"] and life["fault"]["rank"] == rank:
        arm(life["fault"])
    status = 1
    try:
        status = main(life["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def lead(life: dict[str, Any]) -> list[int]:
    """Start the processes of one life and see them to their end; the status of each.

    A survivor of a kill that does not leave, though asked to as a launcher does, is ended and has the status -SIGABRT.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = {}
    for rank in range(life["processes"]):
        pid = os.fork()
        if pid == 0:
            child(life, rank, port)
        processes[pid] = rank
    statuses = [0] * life["processes"]
    left = dict(processes)
    first_death, asked = None, False
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[left.pop(pid)] = os.waitstatus_to_exitcode(status)
            first_death = first_death or time.monotonic()
            if life["fault"] and life["fault"]["all"]:
                end(left, signal.SIGKILL)
        elif first_death and time.monotonic() > first_death + LEAVE_SECONDS:
            end(left, signal.SIGABRT)
        elif first_death and not asked and time.monotonic() > first_death + NOTICE_SECONDS:
            asked = True
            end(left, signal.SIGTERM)
        else:
            time.sleep(0.002)
    return statuses


def end(processes: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes."""
    for process in processes:
        os.kill(process, number)


if __name__ == "__main__":
    for module in ("torch.utils.tensorboard.writer", "tilewright.trainer.record.report"):
        importlib.import_module(module)  # here, and not in every life
    for line in sys.stdin:
        print(json.dumps(lead(json.loads(line))), flush=True)
