"""A process that dies ends the others at once, wherever they stand.

Over NCCL nobody notices a death: the others stand in a collective that never ends, on this machine until ``torchrun``
kills them half a minute later, on other machines until somebody looks. So every process keeps a receive from the next
one pending, over gloo and in a thread. The kernel closes the sockets of a process that dies, whatever killed it; the
receive then fails, the process ends, and the one before it notices that.

A machine that loses its power, or its network, closes nothing. So the kernels on both ends ask each other over these
sockets whether they are still there (TCP keepalive) and close one on which nothing has come back for a minute. No
thread of a process has a part in this: one that is busy for long, or even stopped, is not taken for dead.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tilewright.trainer.errors import AnotherProcessEnded, tell_launcher
from tilewright.trainer.parallel.sharding import World

# What a process has that can notice by itself, being in a collective of gloo, to begin to leave as from any error.
LEAVE_SECONDS = 5.0
# What it has beyond that to leave in good order: trackers send the rest for up to 30 s, the report is written.
CLEAN_UP_SECONDS = 40.0
# A machine whose kernel says nothing for as long counts as gone. A link that comes back, or a virtual machine that is
# moved to another host, is silent for seconds up to half a minute, and the connections live through it; what the others
# lose by waiting for a minute is little beside the hang watch's `health.hang_minutes`.
SILENCE_SECONDS = 60
# Between two questions, and before the first one: few enough packets for a group in which all are connected to all.
QUESTION_SECONDS = 15
# Gloo lets a receive wait no longer than its group's timeout, and this one is to wait for as long as the run takes.
_AS_LONG_AS_THE_RUN = timedelta(days=3650)
_TAG = 7077


@contextmanager
def ended_with_the_others(world: World) -> Iterator[AbstractContextManager[None]]:
    """Within the ``with`` block, end this process soon after another one of the run has died, or has been silent for
    `SILENCE_SECONDS` with its whole machine: status 2.

    A block that ends without an error waits for the next process to come to its end as well. It is given a context
    manager for its innermost part: a process that leaves that with an error has more time for what it still has to do.
    """
    if world.size == 1:
        yield nullcontext()
        return
    before = _sockets()
    group = dist.new_group(backend="gloo", timeout=_AS_LONG_AS_THE_RUN)
    for descriptor, _ in _sockets() - before:
        _close_after_silence(descriptor)
    leaving, left = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(world, group, leaving, left), name="peers", daemon=True)
    watch.start()
    try:
        yield _set_by_an_error(leaving)
        dist.send(torch.zeros(1), (world.rank - 1) % world.size, group=group, tag=_TAG)
        watch.join()
    finally:
        left.set()


def _sockets() -> set[tuple[int, str]]:
    """Descriptor and identity of every socket of this process: gloo gives out none of its own."""
    found = set()
    # On another system than Linux there is no such folder, and silence is left to the hang watch.
    for entry in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # closed meanwhile
            if (opened := os.readlink(entry)).startswith("socket:"):
                found.add((int(entry.name), opened))
    return found


def _close_after_silence(descriptor: int) -> None:
    """Have the kernel close a TCP connection whose other end has not answered for `SILENCE_SECONDS`."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, QUESTION_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, QUESTION_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_SECONDS // QUESTION_SECONDS - 1)
        # While something that was sent is not acknowledged the kernel asks nothing, and would send it again for 15 min.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS)


@contextmanager
def _set_by_an_error(leaving: threading.Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        leaving.set()
        raise


def _watch(world: World, group: Any, leaving: threading.Event, left: threading.Event) -> None:
    following = (world.rank + 1) % world.size
    try:
        dist.recv(torch.zeros(1), following, group=group, tag=_TAG)
    except RuntimeError as closed:
        if left.wait(LEAVE_SECONDS) or (leaving.is_set() and left.wait(CLEAN_UP_SECONDS)):
            return
        error = AnotherProcessEnded(following, silent=os.strerror(errno.ETIMEDOUT) in str(closed))
        print(f"[process {world.rank}] tilewright: {error}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        os._exit(2)
