"""A run that goes back to a checkpoint when its loss spikes, and on from there with other samples."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.trainer import TrainingError, loop
from tilewright.trainer.checkpoints import writer as checkpoint_writer
from tilewright.trainer.checkpoints.checkpoint import CheckpointWriter
from tilewright.trainer.data import open_data
from tilewright.trainer.health.rollback import Rollback, Rollbacks, recorded_rollbacks
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics
from tilewright.trainer.replay import replay

from .conftest import Write, run, torchrun

pytestmark = pytest.mark.usefixtures("without_what_takes_long")
WATCHED = {
    "steps": 12, "checkpoints__every": 3, "evaluation__every": 4, "schedule__kind": "constant",
    "schedule__warmup_steps": 0, "sample__prompt": "", "optimizer__ema_decay": 0.6, "health__spike": "rollback",
    "health__spike_score": 1.5, "health__spike_window": 8,
}  # fmt: skip
BAD = 64  # the first of step 9's samples; the newest checkpoint is then that of step 6


@pytest.fixture
def bad_sample(tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A step with the sample `BAD` in it has for its every target one byte that the text never has.

    Given a number n, the run is killed in the n-th step that it takes.
    """
    loaded = load_recipe(str(tiny_recipe()))
    row = torch.from_numpy(
        open_data(loaded.data).train_stream(sequence_length=32, seed=loaded.seed).batch([BAD]).inputs
    )
    step = loop.train_step

    def patch(killed_in: int = 0) -> None:
        calls = 0

        def spoiled(model: Any, optimizer: Any, micro_batches: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == killed_in:
                raise KeyboardInterrupt
            if any((micro.inputs == row).all(1).any() for micro in micro_batches):
                micro_batches = [
                    dataclasses.replace(micro, targets=torch.full_like(micro.targets, 200)) for micro in micro_batches
                ]
            return step(model, optimizer, micro_batches, *arguments, **options)

        monkeypatch.setattr(loop, "train_step", spoiled)

    return patch


def record(run_directory: Path, name: str = "metrics.jsonl") -> list[tuple[Any, ...]]:
    lines = read_metrics(run_directory / name)[0]
    return [tuple(line[key] for key in ("step", "sample", "loss", "grad_norm", "lr")) for line in lines]


def test_a_spike_takes_the_run_back_to_its_checkpoint_and_on_with_the_samples_after_it(
    tiny_recipe: Write, bad_sample: Callable[[], None]
) -> None:
    recipe = tiny_recipe(**WATCHED)
    undisturbed, _ = run(recipe, "--run_directory", str(recipe.parent / "undisturbed"))
    bad_sample()
    outcome, told = run(recipe)
    steps = record(outcome.run)
    assert [line[0] for line in steps] == list(range(1, 13))
    # Steps 7, 8 and 9 once more, with the samples after those of step 9.
    assert [line[1] for line in steps] == [0, 8, 16, 24, 32, 40, 72, 80, 88, 96, 104, 112]
    assert steps[:6] == record(undisturbed.run)[:6]
    taken_back = record(outcome.run, "metrics-rolled-back.jsonl")
    assert [line[:2] for line in taken_back] == [(7, 48), (8, 56), (9, 64)]
    assert taken_back[:2] == record(undisturbed.run)[6:8]
    evaluations = read_metrics(outcome.run / "metrics.jsonl")[1]
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12]
    (rollback,) = recorded_rollbacks(outcome.run)
    assert (rollback.step, rollback.to, rollback.sample) == (9, 6, 72)
    assert "step 9: the loss is " in told
    assert "back to the checkpoint of step 6, on from there with sample 72" in told
    assert (outcome.run / "incidents" / "step-00000009" / "rank-0.json").is_file()
    # Weights and optimizer are those of the checkpoint: taken in another way, the steps come to the same.
    for step in (7, 8):
        assert replay(outcome.run, step, lambda _: None).result.loss == steps[step - 1][2]
    said: list[str] = []
    replay(outcome.run, 7, said.append)
    assert said[0] == (
        "step 7 as the run went on; it was taken before and rolled back: what was recorded of it is in "
        f"{outcome.run / 'metrics-rolled-back.jsonl'}"
    )
    tokens = [line["tokens"] for line in read_metrics(outcome.run / "metrics.jsonl")[0]]
    assert tokens[5:7] == [48 * 32, 80 * 32]
    assert json.loads((outcome.run / "summary.json").read_text())["rollbacks"] == 1


def test_a_step_that_was_rolled_back_and_not_taken_again_is_refused_by_replay_with_where_its_record_is(
    tiny_recipe: Write, bad_sample: Callable[..., None]
) -> None:
    bad_sample(10)
    with pytest.raises(KeyboardInterrupt):
        run(recipe := tiny_recipe(**WATCHED))
    directory = recipe.parent / "runs" / "tiny-001"
    with pytest.raises(TrainingError) as told:
        replay(directory, 9, print)
    assert str(told.value) == (
        f"{directory} went back on its step 9, which cannot be taken again; what was recorded of it is in "
        f"{directory / 'metrics-rolled-back.jsonl'}, what it worked on in {directory / 'incidents' / 'step-00000009'}; "
        "or name with --step one that was kept (1 to 6)"
    )
    with pytest.raises(TrainingError, match=r"has recorded no step 99; its steps are 1 to 6"):
        replay(directory, 99, print)


@pytest.mark.parametrize("killed_in", [10, 15])
def test_a_run_killed_after_it_went_back_goes_on_as_one_that_was_not_killed(
    tiny_recipe: Write, bad_sample: Callable[..., None], killed_in: int
) -> None:
    """Right after, and after the next checkpoint."""
    recipe = tiny_recipe(**WATCHED)
    bad_sample()
    whole, _ = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    bad_sample(killed_in)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    bad_sample()
    resumed, _ = run(recipe)
    assert resumed.run.name == "tiny-001"
    assert record(resumed.run) == record(whole.run)
    assert len(recorded_rollbacks(resumed.run)) == 1
    ends = [read_metrics(outcome.run / "metrics.jsonl")[1] for outcome in (whole, resumed)]
    assert ends[0] == ends[1]
    assert "heldout_averaged" in ends[0][-1]["eval"]


def test_a_run_goes_back_to_the_checkpoint_that_it_wrote_last_also_where_a_listing_lacks_it(
    tiny_recipe: Write, bad_sample: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.checkpoint, "committed", lambda run, folder: [])
    bad_sample()
    outcome, _ = run(tiny_recipe(**WATCHED))
    assert [rollback.to for rollback in recorded_rollbacks(outcome.run)] == [6]


def test_a_damaged_record_of_rollbacks_is_told_in_a_sentence(
    tiny_recipe: Write, bad_sample: Callable[..., None]
) -> None:
    bad_sample(10)
    recipe = tiny_recipe(**WATCHED)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    (record_file,) = recipe.parent.glob("**/rollbacks.jsonl")
    record_file.write_text('{"step": 9}\n')
    with pytest.raises(TrainingError, match=r"rollbacks.jsonl is damaged; bring it back"):
        run(recipe)


def test_a_checkpoint_that_is_still_being_written_is_waited_for_and_gone_back_to(
    tiny_recipe: Write, bad_sample: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one is written when somebody waits for it."""
    waited_for, write, wait = threading.Event(), checkpoint_writer.dcp_save, CheckpointWriter.wait
    monkeypatch.setattr(
        checkpoint_writer, "dcp_save", lambda *a, **options: (waited_for.wait(10), write(*a, **options))
    )
    monkeypatch.setattr(CheckpointWriter, "wait", lambda writer: (writer.in_flight and waited_for.set(), wait(writer)))
    bad_sample()
    outcome, _ = run(tiny_recipe(**{**WATCHED, "checkpoints__every": 8}))
    assert [(rollback.step, rollback.to) for rollback in recorded_rollbacks(outcome.run)] == [(9, 8)]
    assert [line[1] for line in record(outcome.run)][7:10] == [56, 72, 80]


def test_before_there_is_a_checkpoint_a_spike_is_skipped(tiny_recipe: Write, bad_sample: Callable[[], None]) -> None:
    bad_sample()
    outcome, told = run(tiny_recipe(**{**WATCHED, "checkpoints__every": 10}))
    assert [line["step"] for line in read_metrics(outcome.run / "metrics.jsonl")[0] if line["skipped"]] == [9]
    assert "step 9 skipped: the loss is" in told
    assert recorded_rollbacks(outcome.run) == []
    with pytest.raises(TrainingError, match=r"so there is no checkpoint to go back to; set checkpoints\.every"):
        load_recipe(str(tiny_recipe(**{**WATCHED, "checkpoints__every": 0})))


def test_a_run_that_comes_to_no_other_checkpoint_stops_and_says_why(tiny_recipe: Write) -> None:
    """Here the weights of the only checkpoint are beyond saving: every gradient after it is not finite."""
    recipe = tiny_recipe(checkpoints__every=1, optimizer__learning_rate=1e18, health__spike="rollback")
    told = (
        r"training diverged: the gradient's norm is (nan|inf); the run has gone back to the checkpoint of step 1 "
        r"2 times and come to no other \(health.rollbacks\); the checkpoints are untouched"
    )
    with pytest.raises(TrainingError, match=told):
        run(recipe, "--health.bad_steps", "2", "--health.rollbacks", "2")
    folder = recipe.parent / "runs" / "tiny-001"
    assert [(rollback.step, rollback.to, rollback.sample) for rollback in recorded_rollbacks(folder)] == [
        (3, 1, 24),
        (3, 1, 40),
    ]
    # Each time the same steps, of other samples.
    assert sorted(path.name for path in (folder / "incidents").iterdir()) == [
        f"step-0000000{step}{again}" for step in (2, 3) for again in ("", "-2", "-3")
    ]
    with pytest.raises(TrainingError, match=told):
        run(recipe, "--health.bad_steps", "2", "--health.rollbacks", "2")


def test_rollbacks_to_checkpoints_that_are_gone_are_forgotten(tmp_path: Path, process: World) -> None:
    first, second = Rollback(9, 6, 72, "a spike"), Rollback(20, 18, 200, "a spike")
    rollbacks = Rollbacks(tmp_path, process, step=0, most=2)
    rollbacks.add(first)
    rollbacks.add(second)
    with (tmp_path / "rollbacks.jsonl").open("a") as file:
        file.write('{"step": 30, "to"')  # a process that died there
    assert recorded_rollbacks(tmp_path) == [first, second]
    assert Rollbacks(tmp_path, process, step=18, most=2).first_sample(18) == 200
    # Somebody removed the later checkpoint: the run goes on from step 12, and comes to step 18 anew.
    again = Rollbacks(tmp_path, process, step=12, most=2)
    assert again.first_sample(18) is None
    assert again.first_sample(6) == 72
    again.add(dataclasses.replace(first, sample=100))
    with pytest.raises(TrainingError, match="gone back to the checkpoint of step 6 2 times"):
        again.add(first)
    assert Rollbacks(tmp_path, process, step=6, most=2).first_sample(6) == 100


def test_two_processes_go_back_together_with_the_record_of_one(tiny_recipe: Write, tmp_path: Path) -> None:
    """What lies a little above the median of the last losses is a spike; nothing is learned, so there are many."""
    recipe = tiny_recipe(
        steps=6, checkpoints__every=2, evaluation__every=0, sample__prompt="", optimizer__learning_rate=1e-9,
        health__spike="rollback", health__spike_score=1.0, health__spike_window=4, health__rollbacks=99,
    )  # fmt: skip
    alone = run(recipe, "--run_directory", str(tmp_path / "alone"))[0].run
    assert recorded_rollbacks(alone)
    done = torchrun(2, recipe, "--run_directory", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    places = [[(r.step, r.to, r.sample) for r in recorded_rollbacks(folder)] for folder in (alone, tmp_path / "two")]
    assert places[0] == places[1]
    for name in ("metrics.jsonl", "metrics-rolled-back.jsonl"):
        for a, b in zip(record(alone, name), record(tmp_path / "two", name), strict=True):
            assert a[:2] == b[:2]
            assert a[2] == pytest.approx(b[2], abs=1e-4)
    first = tmp_path / "two" / "incidents"
    assert all(
        sorted(path.name for path in folder.glob("*.json")) == ["rank-0.json", "rank-1.json"]
        for folder in first.iterdir()
    )
