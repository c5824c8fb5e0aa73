"""Processes that watch one another: for as long as a run takes, and with the patience that a clean-up needs."""

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tilewright.trainer.parallel import sharding

# A process of two, in a world whose collectives may take a second: what it does within the watch comes after.
WORLD = """
import os, sys, threading, time
from contextlib import ExitStack
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tilewright.trainer.parallel import peers
from tilewright.trainer.parallel.sharding import World

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
store.set(f"there {rank}", "")
store.wait(["there 0", "there 1"])  # imports take longer than a second
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
world = World(rank, 2, torch.device("cpu"), init_device_mesh("cpu", (2,)))
"""


def two(store: Path, program: str) -> list[tuple[int, str]]:
    """The exit status and the output of each of two processes that run `program`."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORLD + program, str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_a_run_may_take_longer_than_a_collective_may(tmp_path: Path) -> None:
    program = """
peers.LEAVE_SECONDS = 0.1
with peers.ended_with_the_others(world):
    # Past the second: collectives go on, and nobody is taken for dead. The first process decides, for all alike.
    begin, more = time.monotonic(), torch.ones(1)
    while more:
        more.fill_(rank == 0 and time.monotonic() - begin < 2.5)
        dist.broadcast(more, 0)
print("came to its end")
dist.destroy_process_group()
"""
    assert two(tmp_path / "store", program) == [(0, "came to its end\n")] * 2


def test_a_process_that_leaves_with_an_error_of_its_own_may_clean_up_after_another_has_gone(tmp_path: Path) -> None:
    program = """
peers.LEAVE_SECONDS = 0.1

def clean_up():
    if rank == 0:
        noticed.wait()
        threading.Event().wait(1.0)  # longer than a process has that does not leave by itself
        print("sent the rest", flush=True)

noticed, recv = threading.Event(), dist.recv

def watched(*arguments, **options):
    try:
        return recv(*arguments, **options)
    finally:
        noticed.set()

dist.recv = watched
try:
    with peers.ended_with_the_others(world) as leaving, ExitStack() as stack, leaving:
        stack.callback(clean_up)
        raise ValueError("the same on all processes")
except ValueError as error:
    print(error, flush=True)
os._exit(3)
"""
    told = "the same on all processes\n"
    assert two(tmp_path / "store", program) == [(3, "sent the rest\n" + told), (3, told)]


def test_a_process_that_stays_where_it_is_ends_soon_after_another_has_gone(tmp_path: Path) -> None:
    program = """
peers.LEAVE_SECONDS = 0.1
with peers.ended_with_the_others(world) as leaving, leaving:
    if rank == 1:
        os._exit(3)
    threading.Event().wait()  # as in a collective of NCCL
"""
    (status, output), (other, _) = two(tmp_path / "store", program)
    assert (status, other) == (2, 3)
    assert "process 1 of this run ended first" in output


def test_the_kernel_closes_the_connections_of_a_machine_that_no_longer_answers(tmp_path: Path) -> None:
    program = """
import socket
before = peers._sockets()
with peers.ended_with_the_others(world):
    options = set()
    for descriptor, _ in peers._sockets() - before:
        with socket.socket(fileno=os.dup(descriptor)) as end:
            try:
                end.getpeername()
            except OSError:
                continue
            tcp = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            asked = [end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in tcp]
            options.add((end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *asked))
print(sorted(options))
dist.destroy_process_group()
"""
    # The first question comes after 15 s, and three of them in vain make a minute; 60,000 ms for what was sent.
    assert two(tmp_path / "store", program) == [(0, "[(1, 15, 15, 3, 60000)]\n")] * 2


def test_a_machine_that_no_longer_answers_is_not_said_to_have_left_a_message(tmp_path: Path) -> None:
    program = """
peers.LEAVE_SECONDS = 0.1
recv = dist.recv

def silent(*arguments, **options):
    try:
        return recv(*arguments, **options)
    except RuntimeError:
        # What gloo says when the kernel has closed the connection.
        raise RuntimeError("[transport/tcp/pair.cc:547] Read error [10.0.0.2]:40321: Connection timed out") from None

dist.recv = silent
with peers.ended_with_the_others(world) as leaving, leaving:
    if rank == 1:
        os._exit(3)
    threading.Event().wait()
"""
    (status, output), _ = two(tmp_path / "store", program)
    assert status == 2
    assert (
        "process 1 of this run no longer answers, nor does its machine; look whether that has lost its power" in output
    )


def test_one_that_dies_before_it_is_connected_to_is_known_to_have_ended_first() -> None:
    seconds = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=seconds, wait_for_workers=False)
    program = f"""
from datetime import timedelta
import torch.distributed as dist
seconds = timedelta(seconds=60)
store = dist.TCPStore("127.0.0.1", {store.port}, is_master=False, timeout=seconds, wait_for_workers=False)
dist.ProcessGroupGloo(dist.PrefixStore("group", store), 1, 2, seconds)
"""
    keys = store.num_keys()
    with subprocess.Popen([sys.executable, "-c", program]) as other:
        while store.num_keys() == keys and other.poll() is None:  # until it says where it can be reached
            time.sleep(0.02)
        other.kill()
    # By the addresses gloo decides who connects to whom: it is refused, or waits to be connected to.
    with pytest.raises(RuntimeError) as raised:
        dist.ProcessGroupGloo(dist.PrefixStore("group", store), 0, 2, timedelta(seconds=0.2))
    assert sharding._tells_of_an_end(raised.value)
    assert not sharding._tells_of_an_end(RuntimeError("shape mismatch"))
