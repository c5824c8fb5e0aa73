"""The process that the others wait for is named, and where none is slower than the rest, none is."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.trainer.parallel import waiting
from tilewright.trainer.parallel.waiting import SlowRanks, shares_behind
from tilewright.trainer.record import phases
from tilewright.trainer.record.metrics import read_metrics

Write = Callable[..., Path]

# A run of which one process may be slow: in its own compute, in every block, between one gather and the next.
PROGRAM = """
import os, sys
import torch
from tilewright.cli.main import main
from tilewright.model.transformer import Block
from tilewright.trainer import loop
from tilewright.trainer.parallel import waiting

if os.environ.get("TEST_SLOW") == os.environ["RANK"]:
    forward, x = Block.forward, torch.rand(512, 512)

    def slow(self, *inputs):
        for _ in range(20):
            x @ x
        return forward(self, *inputs)

    Block.forward = slow

loop.measured_matmul_peak = lambda device, dtype: 1e12
loop.write_report = lambda run: run / "report.html"
waiting.WINDOW = 8
os._exit(main(sys.argv[1:]))
"""


def trained(recipe: Path, run: Path, slow: str) -> tuple[str, list[dict[str, Any]]]:
    """What a run of two processes said and recorded, of which `slow` is slow."""
    program = run.parent / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    command += ["train", str(recipe), "--run_directory", str(run)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TEST_SLOW": slow}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, read_metrics(run / "metrics.jsonl")[0]


class Seen:
    """What three processes see of each other; `waits` are seconds of 32 steps of a second, this process the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
        self.told: list[str] = []
        monkeypatch.setattr(waiting, "waited_seconds", lambda: waits[0])

        def gather(mine: object) -> list[object]:
            return [mine, *((wait, 1.0, f"machine-{rank}") for rank, wait in enumerate(waits[1:], 1))]

        self.ranks = SlowRanks(torch.nn.Linear(1, 1), shards=3, share=0.2, gather=gather, tell=self.told.append)
        self.lines = [self.ranks.of_step(1.0) for _ in range(waiting.WINDOW)]


def test_the_slow_rank_of_three_is_named_with_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, [0.5, 0.1, 0.5])
    assert seen.lines[-1] == {"slowest_rank": 1, "slowest_behind": pytest.approx(0.4)}
    assert all(line["slowest_rank"] is None for line in seen.lines[:-1])
    (told,) = seen.told
    assert "process 1 on machine-1 is slower than the rest" in told
    assert "40%" in told


def test_where_none_is_slower_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, [0.5, 0.45, 0.5])
    assert (seen.lines[-1]["slowest_rank"], seen.told) == (1, [])


def test_collectives_between_two_steps_are_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Seen(monkeypatch, [0.5, 0.5, 0.5]).ranks
    with waiting.waiting(torch.device("cpu")):
        pass
    monkeypatch.undo()
    ranks.begin_step()
    assert waiting.waited_seconds() == 0


def test_the_reduction_is_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0, 30.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(waiting, "_reductions", deque([(5.0, 6.0), (8.0, 11.0)]))
    timed = phases.PhaseClock(torch.device("cpu"))
    timed.begin("backward")
    timed.insert(waiting.reduction_marks("backward", "reduce"))
    timed.begin("optimizer")
    assert timed.seconds() == {"backward": 16.0, "reduce": 4.0, "optimizer": 10.0}
    assert waiting.reduction_marks("backward", "reduce") == []


@pytest.mark.parametrize("slow", ["1", ""])
def test_of_two_processes_the_slow_one_is_named(tiny_recipe: Write, tmp_path: Path, slow: str) -> None:
    recipe = tiny_recipe(steps=17, sample__prompt="", checkpoints__every=0, health__slow_rank=0.5)
    said, lines = trained(recipe, tmp_path / "run", slow)
    compared = [line for line in lines if line["slowest_rank"] is not None]
    assert [line["step"] for line in compared] == [8, 16]
    if slow:
        assert {line["slowest_rank"] for line in compared} == {int(slow)}
        assert min(line["slowest_behind"] for line in compared) > 0.5
        assert said.count(f"process {slow} on ") == 1  # told once, not every time
        assert "is slower than the rest: they wait for it" in " ".join(said.split())
    else:
        assert all(line["slowest_behind"] < 1 for line in compared)  # how even two busy cores are is not for a test


def test_those_that_wait_less_than_the_others_of_their_replica_are_behind() -> None:
    # Two replicas of four; in the first the third process is slow, in the second all are even and wait unseen.
    waits = [0.5, 0.5, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert shares_behind(waits, [1.0] * 8, 4) == pytest.approx([0, 0, 0.4, 0, 0, 0, 0, 0])
    # A slow machine of two among four machines: both of its processes are.
    waits = [0.3, 0.3, 0.05, 0.04, 0.3, 0.3, 0.31, 0.3]
    behind = shares_behind(waits, [0.5] * 8, 8)
    assert [rank for rank, share in enumerate(behind) if share > 0.1] == [2, 3]
    assert behind[3] == pytest.approx((0.3 - 0.04) / 0.5)
