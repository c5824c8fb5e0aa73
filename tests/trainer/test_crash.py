"""Killed at any instant, a run goes on from its last committed checkpoint with the losses of a run never killed.

Also what becomes of several processes when one of them is asked to leave, or finds the disk full or a file damaged.
"""

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tilewright.trainer.checkpoints.checkpoint import committed
from tilewright.trainer.checkpoints.files import checkpoint_folder, uncommitted_in
from tilewright.trainer.checkpoints.reader import find_damage
from tilewright.trainer.record.metrics import read_metrics

Write = Callable[..., Path]
Life = Callable[..., list[int]]

STEPS = 8
SEED = int(os.environ.get("TILEWRIGHT_CRASH_SEED", time.time_ns() % 1_000_000))
SOAK_MINUTES = float(os.environ.get("TILEWRIGHT_SOAK_MINUTES", "25"))
# How often each point is reached in a run of STEPS steps, from where a kill may still lose something.
CALLS = {
    "before a group is made": 1,
    "before an all-reduce": 20,
    "before the optimizer step": STEPS,
    "after the optimizer step": STEPS,
    "in a line of metrics": STEPS,
    "in the copy": 4,
    "in a file of tensors": 100,
    "before a sync": 8,
    "before a file is verified": 1,
    "between writing and the commit": 4,
    "in the commit": 4,
    "after the commit": 4,
    "in the removal of an old checkpoint": 2,
}
# The same of checkpoints in an object store, which syncs and renames nothing.
CALLS_OF_A_STORE = {
    point: calls for point, calls in CALLS.items() if not point.startswith(("before a sync", "in the re"))
}
CALLS_OF_A_STORE |= {"before an object is there": 12, "before an object is removed": 6}
OF_THE_FIRST = (
    "in a line of metrics", "between writing and the commit", "in the commit", "after the commit",
    "in the removal of an old checkpoint", "before an object is removed",
)  # fmt: skip


@pytest.fixture(scope="module")
def starter() -> Iterator[subprocess.Popen[str]]:
    """A process that starts runs and has them killed; see `crash_worker`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("crash_worker.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def life(starter: subprocess.Popen[str], tiny_recipe: Write, tmp_path: Path) -> Life:
    """One life of a run: the statuses of its processes."""
    recipe = tiny_recipe(steps=STEPS, sample__prompt="")

    def live(run: str, fault: dict[str, Any] | None = None, processes: int = 2, folder: str = "") -> list[int]:
        arguments = ["train", str(recipe), "--run_directory", str(tmp_path / run), "--checkpoints.folder", folder]
        order = {
            "arguments": arguments,
            "processes": processes,
            "log": str(tmp_path / f"{run}.log"),
            "fault": fault and {"what": "SIGKILL", "all": False} | fault,
        }
        assert starter.stdin is not None
        assert starter.stdout is not None
        starter.stdin.write(json.dumps(order) + "\n")
        starter.stdin.flush()
        return [int(status) for status in json.loads(starter.stdout.readline())]

    return live


@pytest.fixture
def object_store(tmp_path: Path) -> str:
    """The URL of a folder in an object store that processes share."""
    sys.path.insert(0, str(Path(__file__).parent))
    importlib.import_module("object_store")  # registers it
    sys.path.pop(0)
    return f"bucket://{tmp_path}/a.store/runs"


def record(run: Path) -> tuple[list[tuple[int, float, float]], list[Any]]:
    """What a run computed: step, loss and gradient norm of every step, and every evaluation."""
    steps, evaluations = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in steps], evaluations


def assert_intact(run: Path, why: str, folder: str = "") -> None:
    """Whatever counts as a checkpoint is whole."""
    for checkpoint in committed(run, folder):
        assert find_damage(checkpoint) is None, why


def assert_as_never_killed(tmp_path: Path, run: str, whole: str, why: str, folder: str = "") -> None:
    assert record(tmp_path / run) == record(tmp_path / whole), why
    steps = [checkpoint.step for checkpoint in committed(tmp_path / run, folder)]
    assert steps[-2:] == [STEPS - 2, STEPS], why
    if f"after step {STEPS}" not in log(tmp_path, run):  # killed after its last commit, it had none to clean up with
        assert len(steps) == 2, why
        assert uncommitted_in(checkpoint_folder(tmp_path / run, folder)) == [], why


def log(tmp_path: Path, run: str) -> str:
    return (tmp_path / f"{run}.log").read_text(errors="replace")[-3000:]


KILLS = [
    {"point": "in the copy", "call": 2, "rank": 1, "all": False},
    {"point": "in a file of tensors", "call": 50, "rank": 0, "all": True},
    {"point": "between writing and the commit", "call": 2, "rank": 0, "all": False},
    {"point": "in the removal of an old checkpoint", "call": 1, "rank": 0, "all": True},
    {"point": "after the optimizer step", "call": 5, "rank": 1, "all": False},
]


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 1), ("SIGUSR1", 1), ("SIGTERM", 2), ("SIGUSR1", 2)])
def test_a_signal_to_one_process_has_all_of_them_write_a_checkpoint_and_leave(
    life: Life, tmp_path: Path, name: str, processes: int
) -> None:
    asked = {"point": "before the optimizer step", "call": 3, "rank": processes - 1, "what": name}
    assert life("run", asked, processes) == [0] * processes, log(tmp_path, "run")
    assert [checkpoint.step for checkpoint in committed(tmp_path / "run")] == [2, 3]
    told = re.search(r"stopped after step 3 with a checkpoint, (\d+\.\d) s after (\w+); the same", log(tmp_path, "run"))
    assert told, log(tmp_path, "run")
    assert told[2] == name
    assert life("run", None, processes) == [0] * processes
    assert [step for step, *_ in record(tmp_path / "run")[0]] == [*range(1, STEPS + 1)]


def test_a_disk_that_is_full_for_one_process_ends_all_in_the_same_sentence_and_loses_nothing(
    life: Life, tmp_path: Path
) -> None:
    # The second sync of the process that is not the first is of its file of the second checkpoint.
    assert life("run", {"point": "before a sync", "call": 2, "rank": 1, "what": "disk full"}) == [2, 2]
    told = log(tmp_path, "run")
    sentence = f"tilewright: the checkpoint of step 4 could not be written to {tmp_path / 'run' / 'checkpoints'}: "
    sentence += "no space is left on the disk; the checkpoint of step 2 is untouched: make room and give the same"
    assert told.count(sentence) == 2, told
    assert "Traceback" not in told
    assert [checkpoint.step for checkpoint in committed(tmp_path / "run")] == [2]
    assert uncommitted_in(tmp_path / "run" / "checkpoints") == []
    assert life("run") == life("whole") == [0, 0]
    assert_as_never_killed(tmp_path, "run", "whole", "the disk was full")


def test_damage_that_one_process_finds_is_told_by_all_in_the_same_sentence(life: Life, tmp_path: Path) -> None:
    stop = {"point": "before the optimizer step", "call": 5, "rank": 0, "what": "SIGTERM"}
    assert life("run", stop) == [0, 0]
    older, newest = committed(tmp_path / "run")
    file = newest.path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert life("run") == [2, 2]
    sentence = f"{newest.path} is damaged: __1_0.distcp is not what was written (SHA-256 differs); "
    sentence += f"remove {newest.path} to go on from the checkpoint of step {older.step}, which is intact"
    assert log(tmp_path, "run").count(sentence) == 2, log(tmp_path, "run")
    shutil.rmtree(newest.path)
    assert life("run") == [0, 0]


def test_killed_at_named_points_and_at_a_random_instant_a_run_gives_the_losses_of_one_never_killed(
    life: Life, tmp_path: Path
) -> None:
    assert life("whole") == [0, 0], log(tmp_path, "whole")
    started = time.monotonic()
    assert life("again") == [0, 0]
    rng = random.Random(SEED)
    instant = {"seconds": rng.uniform(0.0, time.monotonic() - started), "rank": 0, "all": True}
    for number, kill in enumerate([*KILLS, instant]):
        run, why = f"killed-{number}", f"TILEWRIGHT_CRASH_SEED={SEED}, {kill}"
        statuses = life(run, kill)
        assert statuses[kill["rank"]] < 0 or "seconds" in kill, f"{why}: it was not killed {log(tmp_path, run)}"
        if not kill["all"]:
            # The survivor notices, says so in a sentence and leaves as for any error.
            assert statuses[1 - kill["rank"]] == 2, f"{why}: {log(tmp_path, run)}"
            assert "another process of this run ended first" in log(tmp_path, run), why
        assert_intact(tmp_path / run, why)
        assert life(run) == [0, 0], f"{why}: {log(tmp_path, run)}"
        assert_as_never_killed(tmp_path, run, "whole", why)


KILLS_WITH_A_STORE = [
    {"point": "before an object is there", "call": 3, "rank": 0, "all": False},
    {"point": "before an object is removed", "call": 2, "rank": 0, "all": True},
    {"point": "between writing and the commit", "call": 2, "rank": 0, "all": True},
]


def test_killed_while_an_object_store_is_written_to_a_run_gives_the_losses_of_one_never_killed(
    life: Life, object_store: str, tmp_path: Path
) -> None:
    assert life("whole") == [0, 0], log(tmp_path, "whole")
    instant = {"seconds": random.Random(SEED).uniform(0.0, 3.0), "rank": 1, "all": True}
    for number, kill in enumerate([*KILLS_WITH_A_STORE, instant]):
        run, why = f"killed-{number}", f"TILEWRIGHT_CRASH_SEED={SEED}, {kill}"
        statuses = life(run, kill, folder=object_store)
        assert statuses[kill["rank"]] < 0 or "seconds" in kill, f"{why}: it was not killed {log(tmp_path, run)}"
        assert_intact(tmp_path / run, why, object_store)
        assert life(run, folder=object_store) == [0, 0], f"{why}: {log(tmp_path, run)}"
        assert_as_never_killed(tmp_path, run, "whole", why, object_store)


def any_kill(rng: random.Random, processes: int, seconds: float, calls: dict[str, int]) -> dict[str, Any]:
    """A kill at any point or instant, of one process or of all."""
    rank, everyone = rng.randrange(processes), rng.random() < 0.5
    if rng.random() < 0.4:
        return {"seconds": rng.uniform(0.0, seconds), "rank": rank, "all": everyone}
    point = rng.choice(list(calls))
    rank = 0 if point in OF_THE_FIRST else rank
    return {"point": point, "call": rng.randint(1, calls[point]), "rank": rank, "all": everyone}


@pytest.mark.soak
def test_killed_some_hundred_times_runs_give_the_losses_of_runs_never_killed(
    life: Life, object_store: str, tmp_path: Path
) -> None:
    end = time.monotonic() + 60 * SOAK_MINUTES
    seconds = {}
    for processes in (1, 2, 4):
        started = time.monotonic()
        assert life(f"whole-{processes}", processes=processes) == [0] * processes, log(tmp_path, f"whole-{processes}")
        seconds[processes] = time.monotonic() - started
    number = killed = 0
    while time.monotonic() < end:
        seed, number = SEED + number, number + 1
        rng, run = random.Random(seed), f"killed-{seed}"
        processes, folder = rng.choice((1, 2, 2, 4)), rng.choice(("", "", object_store))
        calls = CALLS_OF_A_STORE if folder else CALLS
        for _ in range(rng.randint(1, 6)):
            kill = any_kill(rng, processes, seconds[processes], calls)
            why = f"TILEWRIGHT_CRASH_SEED={seed}, {kill}"
            statuses = life(run, kill, processes, folder)
            killed += min(statuses) < 0
            assert all(status <= 0 or status == 2 for status in statuses), f"{why}: {log(tmp_path, run)}"
            assert -6 not in statuses, f"{why}: a survivor did not notice"
            assert_intact(tmp_path / run, why, folder)
        why = f"TILEWRIGHT_CRASH_SEED={seed}"
        assert life(run, None, processes, folder) == [0] * processes, f"{why}: {log(tmp_path, run)}"
        assert_as_never_killed(tmp_path, run, f"whole-{processes}", why, folder)
        print(f"{killed} kills in {number} runs, {max(end - time.monotonic(), 0.0) / 60:.1f} minutes left", flush=True)
    print(f"{killed} kills in {number} runs from TILEWRIGHT_CRASH_SEED={SEED}")
