"""Checkpoints: committed last, verified first, never the loss of what was there before."""

import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.filesystem as dcp_filesystem

from tilewright.model import Transformer, from_preset
from tilewright.trainer.checkpoint import MARKER, Committed, committed, load, save, training_state
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimizer import build_optimizer
from tilewright.trainer.parallel import World, sharded_model, world
from tilewright.trainer.recipe import Optimizer

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
    assert f"remove {saved.path} to go on from the checkpoint of step 10" in str(told.value)
    # The advice holds: the one before loads.
    load(committed(saved.path.parent.parent)[0], state_of(processes, 9), processes)


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


def forge_marker(saved: Committed) -> None:
    """Make the marker fit what is there, as an attacker would."""
    import hashlib

    files = {}
    for file in saved.path.iterdir():
        if file.name != MARKER:
            content = file.read_bytes()
            files[file.name] = (len(content), hashlib.sha256(content).hexdigest())
    (saved.path / MARKER).write_text(json.dumps({"format": 1, "step": saved.step, "files": files}))


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
