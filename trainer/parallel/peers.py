"""A process that dies ends the others at once, wherever they stand.

Over NCCL nobody notices a death: the others stand in a collective that never ends, on this machine until ``torchrun``
kills them half a minute later, on other machines until somebody looks. So every process keeps a receive from the next
one pending, over gloo and in a thread. The kernel closes the sockets of a process that dies, whatever killed it; the
receive then fails, the process ends, and the one before it notices that.

A machine that loses its power closes nothing. The others then stand in their collective until the hang watch ends them,
after ``health.hang_minutes``: the rendezvous misses the machine after 15 s, but an agent of ``torchrun`` whose own
processes are alive starts them again only when another machine comes to join.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tilewright.trainer.errors import AnotherProcessEnded, tell_launcher
from tilewright.trainer.parallel.sharding import World

# What a process has that can notice by itself, being in a collective of gloo, to begin to leave as from any error.
LEAVE_SECONDS = 5.0
# What it has beyond that to leave in good order: trackers send the rest for up to 30 s, the report is written.
CLEAN_UP_SECONDS = 40.0
# Gloo lets a receive wait no longer than its group's timeout, and this one is to wait for as long as the run takes.
_AS_LONG_AS_THE_RUN = timedelta(days=3650)
_TAG = 7077


@contextmanager
def ended_with_the_others(world: World) -> Iterator[AbstractContextManager[None]]:
    """Within the ``with`` block, end this process soon after another one of the run has died: status 2.

    A block that ends without an error waits for the next process to come to its end as well. It is given a context
    manager for its innermost part: a process that leaves that with an error has more time for what it still has to do.
    """
    if world.size == 1:
        yield nullcontext()
        return
    group = dist.new_group(backend="gloo", timeout=_AS_LONG_AS_THE_RUN)
    leaving, left = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(world, group, leaving, left), name="peers", daemon=True)
    watch.start()
    try:
        yield _set_by_an_error(leaving)
        dist.send(torch.zeros(1), (world.rank - 1) % world.size, group=group, tag=_TAG)
        watch.join()
    finally:
        left.set()


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
    except RuntimeError:
        if left.wait(LEAVE_SECONDS) or (leaving.is_set() and left.wait(CLEAN_UP_SECONDS)):
            return
        error = AnotherProcessEnded(following)
        print(f"[process {world.rank}] tilewright: {error}", file=sys.stderr, flush=True)
        tell_launcher(str(error))
        os._exit(2)
