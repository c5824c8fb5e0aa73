"""The hang watch: how long it waits, and for whom."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.trainer.checkpoints import writer as checkpoint_writer
from tilewright.trainer.checkpoints.checkpoint import CheckpointWriter
from tilewright.trainer.health import hang
from tilewright.trainer.health.hang import alive, hang_watch
from tilewright.trainer.health.interruption import Interruption
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.recipe import Checkpoints


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def test_a_signal_that_comes_before_the_watch_shortens_it_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float] = []
    heard = threading.Event()
    hurry = hang.hurry

    def hearing(seconds: float) -> None:
        hurry(seconds)
        heard.set()

    monkeypatch.setattr("tilewright.trainer.health.interruption.hurry", hearing)
    monkeypatch.setattr(hang.faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    with Interruption(120.0) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(30)
        with hang_watch(tmp_path, 0, 60):
            pass
    assert interruption.requested
    with hang_watch(tmp_path, 0, 60):
        pass
    assert armed == [120.0, 3600.0]


def test_a_sign_of_life_from_another_thread_is_over_before_the_watch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, left, closed = threading.Event(), threading.Event(), list[bool]()

    def arm(seconds: float, exit: bool, file: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            left.wait(0.2)
            closed.append(file.closed)

    thread = threading.Thread(target=alive)
    monkeypatch.setattr(hang.faulthandler, "dump_traceback_later", arm)
    with hang_watch(tmp_path, 0, 60):
        thread.start()
        assert inside.wait(30)
    left.set()
    thread.join()
    assert closed == [False]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_who_waits_for_the_others_parts_of_a_checkpoint_is_alive_and_who_hangs_in_its_own_is_not(
    processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The first process, which has to make room before the others can write, and then waits for one of them."""
    sign = threading.Event()
    during: list[bool] = []
    make_room, gather = CheckpointWriter._make_room, checkpoint_writer.dist.all_gather_object

    def own_part(writer: CheckpointWriter, *arguments: Any) -> None:
        sign.clear()
        during.append(sign.wait(0.1))
        make_room(writer, *arguments)

    def slow_others(*arguments: Any, **options: Any) -> None:
        sign.clear()
        during.append(sign.wait(10))
        gather(*arguments, **options)

    monkeypatch.setattr(checkpoint_writer, "_ALIVE_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint_writer, "alive", sign.set)
    monkeypatch.setattr(CheckpointWriter, "_make_room", own_part)
    monkeypatch.setattr(checkpoint_writer.dist, "all_gather_object", slow_others)
    with CheckpointWriter(tmp_path, processes, Checkpoints(asynchronous=asynchronous)) as writer:
        writer.save({"model.a": torch.zeros(1)}, 1)
        writer.wait()
    assert during == [False, True, True, True]
