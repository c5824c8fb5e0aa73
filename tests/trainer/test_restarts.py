"""A process that dies: the others end promptly, the reason is told last, and torchrun brings the run back."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tilewright.cli.main import main
from tilewright.trainer.record.metrics import read_metrics

Write = Callable[..., Path]
STEPS, FATAL = 8, 5

# A process of a run to which something happens in the step FATAL of its first life.
PROGRAM = f"""
import os, signal, sys, threading
from tilewright.cli.main import main
from tilewright.trainer import loop
from tilewright.trainer.parallel import peers

what = os.environ.get("TEST_FATE", "")
one_step = loop._Training._one_step

def step(self):
    if self.step == {FATAL - 1} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if what == "agent dies":
            os.kill(os.getppid(), signal.SIGKILL)
        if what in ("dies", "agent dies") or what == "last dies" and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "last dies" and os.environ.get("TEST_STUCK"):
            threading.Event().wait()  # as in a collective of NCCL, which does not end when a process does
    return one_step(self)

loop._Training._one_step = step
loop.measured_matmul_peak = lambda device, dtype: 1e12
peers.LEAVE_SECONDS = 0.5 if os.environ.get("TEST_STUCK") else peers.LEAVE_SECONDS
os._exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(tiny_recipe: Write, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts torchrun with options of its own on a run of STEPS steps; keyword arguments are environment variables."""
    recipe = tiny_recipe(steps=STEPS, sample__prompt="", checkpoints__asynchronous=False)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def torchrun(*options: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += [str(program), "train", str(recipe), "--run_directory", str(tmp_path / "run")]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return torchrun


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")[0]]


def assert_as_never_killed(tiny_recipe: Write, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=STEPS, sample__prompt="")
    assert main(["train", str(recipe), "--run_directory", str(tmp_path / "whole")]) == 0
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert [step for step, _ in found] == [*range(1, STEPS + 1)]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_torchrun_brings_a_killed_run_back_from_its_last_checkpoint(
    start: Callable[..., subprocess.Popen[str]], tiny_recipe: Write, tmp_path: Path
) -> None:
    job = start("--standalone", "--nproc-per-node", "2", "--max-restarts", "2", TEST_FATE="last dies")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output[-3000:]
    assert "after step 4" in output  # the second life went on from the checkpoint before the kill
    assert_as_never_killed(tiny_recipe, tmp_path)


def test_the_machines_that_are_left_go_on_without_the_one_that_died(
    start: Callable[..., subprocess.Popen[str]], tiny_recipe: Write, tmp_path: Path
) -> None:
    """Two agents with a process each, of which one is killed with its process, for good."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for number, fate in enumerate(("", "agent dies")):
        rendezvous = f"is_host={number == 0},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        agents.append(
            start(
                "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test",
                "--rdzv-conf", rendezvous, TEST_FATE=fate,
            )
        )  # fmt: skip
    output, _ = agents[0].communicate(timeout=300)
    agents[1].communicate(timeout=10)
    assert agents[1].returncode == -signal.SIGKILL
    assert agents[0].returncode == 0, output[-3000:]
    assert "after step 4" in output
    assert_as_never_killed(tiny_recipe, tmp_path)


@pytest.mark.parametrize("stuck", ["", "1"])
def test_a_dead_process_ends_the_others_and_its_reason_is_told_last(
    start: Callable[..., subprocess.Popen[str]], stuck: str
) -> None:
    variables: dict[str, Any] = {"TEST_FATE": "last dies", "TEST_STUCK": stuck}
    job = start("--standalone", "--nproc-per-node", "2", **variables)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 1
    _, _, cause = output.partition("Root Cause (first observed failure):")
    assert "rank      : 1 (local_rank: 1)" in cause, output[-3000:]
    assert "Signal 9 (SIGKILL) received" in cause
    if stuck:
        assert "[process 0] tilewright: process 1 of this run ended first; its own message says why" in output
        assert "(exitcode: -9" in output
        assert "exitcode: -9) local_rank: 0" not in output  # it ended by itself and was not killed


def test_a_stuck_process_that_is_asked_to_stop_writes_where_it_stands_and_ends(tmp_path: Path) -> None:
    program = f"""
import torch.distributed as dist
from datetime import timedelta
from pathlib import Path
from tilewright.trainer.health.hang import hang_watch
from tilewright.trainer.health.interruption import Interruption

def in_a_collective_for_ever():
    store = dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(hours=1))
    print("stuck", flush=True)
    store.get("never")

with Interruption(0.1), hang_watch(Path({str(tmp_path)!r}), 3, 60):
    in_a_collective_for_ever()
"""
    job = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "stuck\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 1
    assert "in_a_collective_for_ever" in (tmp_path / "hang-rank-3.txt").read_text()
