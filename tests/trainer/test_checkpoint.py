"""Checkpoints: committed last, verified first, never the loss of what was there before."""

import errno
import json
import math
import os
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem

from tilewright.model import Transformer, from_preset
from tilewright.trainer.checkpoints import reader as checkpoint_reader
from tilewright.trainer.checkpoints import writer as checkpoint_writer
from tilewright.trainer.checkpoints.checkpoint import (
    MARKER,
    CheckpointWriter,
    Committed,
    committed,
    load,
    training_state,
)
from tilewright.trainer.checkpoints.files import Fingerprint, HeldOut
from tilewright.trainer.checkpoints.reader import find_damage
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.recipe import Checkpoints, Optimizer
from tilewright.trainer.recipe.file import load_recipe

CONFIG = from_preset(
    "llama-10m", vocab_size=30, hidden_size=16, layers=1, heads=2, kv_heads=2, head_dim=8, intermediate_size=24,
    max_sequence_length=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def state_of(processes: World, seed: int, hidden_size: int = 16) -> dict[str, torch.Tensor]:
    config = from_preset("llama-10m", **{**vars(CONFIG), "hidden_size": hidden_size})
    model = sharded_model(config, processes, compute_dtype=torch.float32, compile=False, seed=seed)
    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-3))
    for state in optimizer.state.values():  # something to tell from zeros
        state["step"] += seed
        state["exp_avg"].fill_(seed / 7)
    return training_state(model, optimizer)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def save(state: dict[str, torch.Tensor], run: Path, step: int, processes: World, **options: Any) -> Committed:
    """Take a checkpoint of `state` and wait for it."""
    with CheckpointWriter(run, processes, Checkpoints(**options)) as writer:
        writer.save(state, step)
    return committed(run)[-1]


@pytest.fixture
def saved(processes: World, tmp_path: Path) -> Committed:
    save(state_of(processes, 1), tmp_path, 10, processes, keep=5)
    return save(state_of(processes, 2), tmp_path, 20, processes, keep=5)


def test_parameters_and_optimizer_state_come_back_to_the_bit(processes: World, saved: Committed) -> None:
    state = state_of(processes, 9)
    load(saved, state, processes)
    expected = state_of(processes, 2)
    assert len(expected) == 4 * len(dict(Transformer(CONFIG).named_parameters()))
    for name, tensor in state.items():
        assert torch.equal(local(tensor), local(expected[name])), name


def test_a_plain_model_in_one_process_reads_the_sharded_checkpoint(processes: World, saved: Committed) -> None:
    model = Transformer(CONFIG)
    load(saved, training_state(model))
    expected = state_of(processes, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, local(expected[f"model.{name}"]))


def test_only_the_newest_are_kept(processes: World, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(state_of(processes, 1), tmp_path, step, processes, keep=2)
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == [3, 4]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 1}, [60]),
        ({"keep": 2, "keep_every": 20}, [20, 40, 50, 60]),
        ({"keep": 2, "keep_best": True}, [30, 50, 60]),
        ({"keep": 1, "keep_every": 40, "keep_best": True}, [30, 40, 60]),
    ],
)
def test_the_newest_the_nth_and_the_best_are_kept(
    processes: World, tmp_path: Path, options: dict[str, Any], kept: list[int]
) -> None:
    losses = {10: math.nan, 20: 3.0, 30: 2.0, 40: None, 50: 2.5, 60: math.inf}
    with CheckpointWriter(tmp_path, processes, Checkpoints(**options)) as writer:
        for step, loss in losses.items():
            writer.save({"model.a": torch.zeros(1)}, step, heldout=None if loss is None else HeldOut(loss, 100))
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == kept


def test_the_best_over_each_text_is_kept(processes: World, tmp_path: Path) -> None:
    scores = {10: HeldOut(2.0, 900), 20: HeldOut(3.0, 100), 30: HeldOut(4.0, 100), 40: HeldOut(5.0, 100)}
    with CheckpointWriter(tmp_path, processes, Checkpoints(keep=1, keep_best=True)) as writer:
        for step, heldout in scores.items():
            writer.save({"model.a": torch.zeros(1)}, step, heldout=heldout)
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == [10, 20, 40]


def test_what_killed_runs_left_is_removed_with_the_next_checkpoint(processes: World, saved: Committed) -> None:
    run = saved.path.parent.parent
    (saved.path / MARKER).unlink()
    save(state_of(processes, 3), run, 30, processes)
    assert sorted(path.name for path in saved.path.parent.iterdir()) == ["step-00000010", "step-00000030"]


def write_when(gate: threading.Event, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> None:
    """Let the background write begin only once `gate` is set."""
    write = checkpoint_writer.dcp_save

    def waiting(*args: Any, **options: Any) -> Any:
        assert gate.wait(timeout=10)
        gate.clear()
        result = write(*args, **options)
        then()
        return result

    monkeypatch.setattr(checkpoint_writer, "dcp_save", waiting)


def test_a_checkpoint_is_of_the_instant_it_was_taken_though_training_goes_on(
    processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write_when(gate, monkeypatch)
    state = state_of(processes, 2)
    with CheckpointWriter(tmp_path, processes, Checkpoints()) as writer:
        writer.save(state, 10)
        assert writer.in_flight
        with torch.no_grad():
            for tensor in state.values():
                tensor.mul_(3).add_(1)
        gate.set()
        writer.wait()
        assert not writer.in_flight
    load(committed(tmp_path)[0], state, processes)
    expected = state_of(processes, 2)
    for name, tensor in state.items():
        assert torch.equal(local(tensor), local(expected[name])), name


def test_a_save_waits_for_the_one_before(processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    gate, wait = threading.Event(), CheckpointWriter.wait
    write_when(gate, monkeypatch, then=lambda: events.append("written"))
    copy = checkpoint_writer.staged
    monkeypatch.setattr(checkpoint_writer, "staged", lambda state: events.append("copied") or copy(state))
    # What is in flight may be written when somebody waits for it, and not before.
    monkeypatch.setattr(CheckpointWriter, "wait", lambda writer: (writer.in_flight and gate.set()) or wait(writer))
    with CheckpointWriter(tmp_path, processes, Checkpoints(keep=3)) as writer:
        for step in (1, 2, 3):
            writer.save({"model.a": torch.zeros(1)}, step)
    assert events == ["copied", "written"] * 3
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == [1, 2, 3]


def test_an_error_elsewhere_does_not_cost_the_checkpoint_in_flight(
    processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write_when(gate, monkeypatch)

    def diverge(writer: CheckpointWriter) -> None:
        writer.save(state_of(processes, 1), 10)
        gate.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, processes, Checkpoints()) as writer:
        diverge(writer)
    assert [checkpoint.step for checkpoint in committed(tmp_path)] == [10]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--checkpoints.keep_every", "-1"], "checkpoints.keep_every is -1; it must be 0 or more"),
        (
            ["--checkpoints.keep_best", "true", "--evaluation.every", "4"],
            r"keep_best is true, but no step before the last is both evaluated \(evaluation.every 4\) and saved "
            r"\(checkpoints.every 3\)",
        ),
        (["--checkpoints.keep_best", "true", "--evaluation.every", "0"], r"\(evaluation.every 0\) and saved"),
    ],
)
def test_what_can_keep_nothing_is_refused(tiny_recipe: Callable[..., Path], overrides: list[str], message: str) -> None:
    recipe = str(tiny_recipe(checkpoints__every=3))
    with pytest.raises(TrainingError, match=message):
        load_recipe(recipe, overrides)
    assert load_recipe(recipe, ["--checkpoints.keep_best", "true", "--evaluation.every", "3"]).checkpoints.keep_best


def test_without_asynchrony_a_save_returns_with_the_checkpoint_committed(processes: World, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, processes, Checkpoints(asynchronous=False)) as writer:
        writer.save(state_of(processes, 1), 10)
        assert not writer.in_flight
        assert [checkpoint.step for checkpoint in committed(tmp_path)] == [10]


def test_a_checkpoint_without_its_marker_does_not_count_and_is_written_over(processes: World, saved: Committed) -> None:
    run = saved.path.parent.parent
    (saved.path / MARKER).unlink()
    (saved.path / "left-over").write_text("of a killed run")
    assert [checkpoint.step for checkpoint in committed(run)] == [10]
    again = save(state_of(processes, 3), run, 20, processes, keep=5)
    assert not (again.path / "left-over").exists()
    load(again, state_of(processes, 9), processes)


def damage_byte(path: Path) -> None:
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def damage_size(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, r"is damaged: __0_0.distcp is not what was written"),
        (damage_size, r"is damaged: __0_0.distcp has \d+ bytes where \d+ were written"),
        (lambda path: (path / "__0_0.distcp").unlink(), r"lacks its file __0_0.distcp"),
        (lambda path: (path / MARKER).write_text("{"), r"COMMITTED.json is not one that this version wrote"),
        (
            lambda path: (path / MARKER).write_text('{"format": 99, "step": 20, "files": {}}'),
            r"is not one that this version",
        ),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_offered(
    processes: World, saved: Committed, damage: object, message: str
) -> None:
    damage(saved.path)  # type: ignore[operator]
    with pytest.raises(TrainingError, match=message) as told:
        load(saved, state_of(processes, 9), processes)
    assert f"remove {saved.path} to go on from the checkpoint of step 10, which is intact" in str(told.value)
    # The advice holds: the one before loads.
    load(committed(saved.path.parent.parent)[0], state_of(processes, 9), processes)


def test_the_newest_intact_checkpoint_is_offered_and_the_damaged_ones_before_it_are_named(
    processes: World, saved: Committed
) -> None:
    run = saved.path.parent.parent
    newest = save(state_of(processes, 3), run, 30, processes, keep=5)
    damage_byte(newest.path)
    damage_size(saved.path)
    with pytest.raises(
        TrainingError,
        match=f"remove {newest.path} and {saved.path} to go on from the checkpoint of step 10, which is intact",
    ):
        load(newest, state_of(processes, 9), processes)
    damage_byte(run / "checkpoints" / "step-00000010")
    with pytest.raises(TrainingError, match="none of this run's other checkpoints is intact: restore it from a copy"):
        load(newest, state_of(processes, 9), processes)


def test_each_process_reads_its_share_of_the_files_and_all_hear_of_the_damage(
    saved: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"__{rank}_0.distcp": Fingerprint(1, "-") for rank in range(5)} | {".metadata": Fingerprint(1, "-")}
    read: list[list[str]] = []
    seen = iter([files])  # by the first process, and no other asks
    monkeypatch.setattr(checkpoint_reader, "marked_files", lambda _: next(seen))
    monkeypatch.setattr(
        checkpoint_reader, "_damage", lambda _, name, __: read[-1].append(name) or ("bad" if "__3" in name else None)
    )

    class Process:
        size = 4

        def __init__(self, rank: int) -> None:
            self.rank, self.first = rank, rank == 0

        def first_decides(self, decision: Callable[[], object]) -> object:
            return decision() if self.first else sorted(files.items())

        def gather(self, problem: object) -> list[object]:
            return [problem, ("of another process", None)]

    for rank in range(4):
        read.append([])
        told = find_damage(saved, Process(rank))  # type: ignore[arg-type]
        assert told == ("bad" if "__3_0.distcp" in read[-1] else "of another process")
    assert sorted(name for names in read for name in names) == sorted(files)
    assert max(map(len, read)) == 2


def test_a_file_that_cannot_be_read_is_told_to_all_processes_and_not_taken_for_damage(
    processes: World, saved: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[object] = []
    gather = World.gather
    monkeypatch.setattr(World, "gather", lambda self, value: gathered.append(value) or gather(self, value))

    def failing(path: Path) -> Fingerprint:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Fingerprint, "of", failing)
    told = r"step-00000020 cannot be read: .metadata: Input/output error; mend that, then give the same command again$"
    with pytest.raises(TrainingError, match=told):
        load(saved, state_of(processes, 9), processes)
    assert len(gathered) == 1


def test_the_checkpoint_of_another_model_is_refused_with_the_first_difference(
    processes: World, saved: Committed
) -> None:
    with pytest.raises(
        TrainingError, match=r"another model: model.embedding.weight has shape \(30, 16\) there and \(30, 32\)"
    ):
        load(saved, state_of(processes, 1, hidden_size=32), processes)
    with pytest.raises(TrainingError, match=r"another model: it holds no model.more"):
        load(saved, {"model.more": torch.zeros(1)}, processes)


class Evil:
    """What a foreign checkpoint might hold: unpickling it would run a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.flag}",)


def test_code_in_a_foreign_checkpoint_is_not_run(processes: World, saved: Committed, tmp_path: Path) -> None:
    flag = tmp_path / "it ran"
    (saved.path / ".metadata").write_bytes(pickle.dumps(Evil(flag)))
    forge_marker(saved)
    with pytest.raises(TrainingError, match=r"was not written by Tilewright .* has no place in a checkpoint"):
        load(saved, state_of(processes, 9), processes)
    assert not flag.exists()


def test_metadata_that_name_a_file_which_was_not_verified_are_refused(processes: World, saved: Committed) -> None:
    there = saved.path / ".metadata"
    metadata = pickle.loads(there.read_bytes())
    for part in metadata.storage_data.values():
        part.relative_path = "../step-00000010/__0_0.distcp"
    there.write_bytes(pickle.dumps(metadata))
    forge_marker(saved)
    told = r"names the file ../step-00000010/__0_0.distcp, which is none of this checkpoint's; remove"
    with pytest.raises(TrainingError, match=told):
        load(saved, state_of(processes, 9), processes)


@pytest.mark.parametrize("name", ["../step-00000010/__0_0.distcp", "/etc/hostname", ".."])
def test_a_marker_that_names_a_file_elsewhere_is_refused(processes: World, saved: Committed, name: str) -> None:
    marker = json.loads((saved.path / MARKER).read_text())
    marker["files"][name] = marker["files"][".metadata"]
    (saved.path / MARKER).write_text(json.dumps(marker))
    with pytest.raises(TrainingError, match=r"COMMITTED.json is not one that this version wrote; remove"):
        load(saved, state_of(processes, 9), processes)


def test_what_a_file_returns_from_a_write_does_not_count(processes: World, tmp_path: Path) -> None:
    class Silent:
        def write(self, data: bytes) -> None:
            """As some file systems do, say nothing."""

    file = checkpoint_writer._FingerprintedFile(Silent())
    assert file.write(memoryview(torch.arange(3, dtype=torch.int32).numpy())) == 12  # type: ignore[arg-type]
    assert file.fingerprint().size == 12


def forge_marker(saved: Committed) -> None:
    """Make the marker fit what is there, as an attacker would."""
    import hashlib

    files = {}
    for file in saved.path.iterdir():
        if file.name != MARKER:
            content = file.read_bytes()
            files[file.name] = (len(content), hashlib.sha256(content).hexdigest())
    (saved.path / MARKER).write_text(json.dumps({"format": 1, "step": saved.step, "files": files}))


def test_a_disk_that_fills_in_the_middle_of_a_tensor_is_told_in_one_sentence(processes: World, tmp_path: Path) -> None:
    """A file may not grow past 100 kB; what `torch.save` makes of that names neither the disk nor the file."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, previous[1]))
    try:
        with pytest.raises(TrainingError, match=r"step 10 could not be written .*File too large; no earlier one was"):
            save({"model.a": torch.zeros(50_000), "model.b": torch.zeros(50_000)}, tmp_path, 10, processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_no_space_left_is_told_in_one_sentence_and_the_checkpoint_before_stays(
    processes: World, saved: Committed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = saved.path.parent.parent
    monkeypatch.setattr(dcp_filesystem.os, "fsync", full)
    with pytest.raises(
        TrainingError, match=r"step 30 could not be written .* no space is left .* step 20 is untouched: make room"
    ):
        save(state_of(processes, 3), run, 30, processes, keep=1)
    monkeypatch.undo()
    assert [checkpoint.step for checkpoint in committed(run)] == [10, 20]
    assert not (run / "checkpoints" / "step-00000030").exists()
    load(saved, state_of(processes, 9), processes)
