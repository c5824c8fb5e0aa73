"""Steps that go wrong: skipped by all processes alike, told of, kept for a look, and at last the end of the run."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.cli.main import main
from tilewright.model import from_preset
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.health import check as health
from tilewright.trainer.health.check import LossWatch
from tilewright.trainer.health.hang import hang_watch
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model
from tilewright.trainer.recipe import Health, Optimizer
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.replay import replay
from tilewright.trainer.run_directory import choose_run_directory, save_recipe
from tilewright.trainer.step import MicroBatch, train_step

from .conftest import Write, run, steps_of

CONFIG = from_preset(
    "llama-10m", vocab_size=40, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=24,
    max_sequence_length=12,
)  # fmt: skip
# Takes each step whose loss is not above the median of the four before; as nothing is learned, that is about half.
STRICT = {
    "health__spike": "skip", "health__spike_score": 0.0, "health__spike_window": 4, "health__bad_steps": 9,
    "optimizer__learning_rate": 1e-9,
}  # fmt: skip


def test_a_spike_is_what_lies_far_above_the_median_of_the_last_losses() -> None:
    losses = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 50.0, 2.0]
    watch = LossWatch(Health(spike_score=5.0, spike_window=8), losses)
    # The median is 2.0, the median distance from it 0.1, and the outlier moves neither.
    assert watch.limit() == pytest.approx(2.0 + 5 * 1.4826 * 0.1)
    for _ in range(8):
        watch.add(4.0)
    assert watch.limit() == 4.0
    assert LossWatch(Health(spike_window=8), [2.0]).limit() == math.inf
    assert LossWatch(Health(spike="none", spike_window=4), losses).limit() == math.inf


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("cause", ["gradient", "loss"])
def test_a_bad_step_leaves_weights_and_optimizer_as_they_were(process: World, kind: str, cause: str) -> None:
    model = sharded_model(CONFIG, process, compute_dtype=torch.float32, compile=False, seed=5)
    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-2, kind=kind))  # type: ignore[arg-type]

    def step(limit: float = math.inf) -> Any:
        inputs = torch.arange(24).view(2, 12)
        micro_batches = [MicroBatch(rows[None], rows[None].flip(1), None) for rows in inputs]
        return train_step(model, optimizer, micro_batches, process, max_grad_norm=1.0, loss_limit=limit)

    def state() -> list[torch.Tensor]:
        kept = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
        whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (*model.parameters(), *kept)]
        return [x.detach().clone() for x in whole]

    assert step().stepped
    if cause == "gradient":
        # One weight that makes everything after it nan.
        model.blocks[0].mlp.down.weight.to_local().data[0, 0] = math.nan
    before = state()
    result = step(limit=-1.0 if cause == "loss" else math.inf)
    assert not result.stepped
    assert math.isnan(result.grad_norm) == (cause == "gradient")
    torch.testing.assert_close(state(), before, rtol=0, atol=0, equal_nan=True)


def test_steps_skipped_as_spikes_are_recorded_kept_and_the_same_after_a_resumption(
    tiny_recipe: Write, tmp_path: Path
) -> None:
    recipe = tiny_recipe(steps=12, checkpoints__every=2, checkpoints__keep=9, **STRICT)
    outcome, told = run(recipe)
    whole = steps_of(outcome.run)
    skipped = [line["step"] for line in whole if line["skipped"]]
    assert skipped
    assert len(skipped) < 11
    first = skipped[0]
    folder = outcome.run / "incidents" / f"step-{first:08d}"
    assert f"step {first} skipped: the loss is" in told
    assert str(folder) in told.replace("\n", "")
    facts = json.loads((folder / "rank-0.json").read_text())
    # Eight sequences a step in micro-batches of two.
    starts = [part["samples"] for part in facts["micro_batches"]]
    assert starts == [[8 * (first - 1) + 2 * n, 8 * (first - 1) + 2 * n + 2] for n in range(4)]
    for part in facts["micro_batches"]:
        assert list(part["documents"]) == [str(sample) for sample in range(*part["samples"])]
        assert all(".ds:" in name for names in part["documents"].values() for name in names)
    tensors = torch.load(folder / "rank-0.pt", weights_only=True)
    assert tensors["0.inputs"].shape == (2, 32)

    part = tiny_recipe(steps=12, checkpoints__every=2, checkpoints__keep=9, **STRICT)
    resumed = outcome.run.parent / "resumed"
    outcome.run.rename(resumed)
    for kept in sorted((resumed / "checkpoints").iterdir())[2:]:
        (kept / "COMMITTED.json").unlink()
    again, _ = run(part, "--run_directory", str(resumed))
    same = ("step", "loss", "grad_norm", "skipped")
    assert [[line[key] for key in same] for line in steps_of(again.run)] == [[x[key] for key in same] for x in whole]


def test_too_many_bad_steps_in_a_row_end_the_run_and_keep_the_checkpoints(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(steps=6, checkpoints__every=1, checkpoints__keep=2)
    with pytest.raises(
        TrainingError, match=r"training diverged: .*; 2 steps in a row were skipped \(health.bad_steps\)"
    ):
        run(recipe, "--optimizer.learning_rate", "1e18", "--health.bad_steps", "2")
    run_directory = recipe.parent / "runs" / "tiny-001"
    assert [line["skipped"] for line in steps_of(run_directory)] == [False, True, True]
    assert [path.name for path in (run_directory / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_run_that_hangs_writes_where_it_stands_and_ends(tmp_path: Path) -> None:
    script = f"""
import threading
from pathlib import Path
from tilewright.trainer.health.hang import hang_watch, not_watched

def waiting_for_a_collective_that_never_comes():
    threading.Event().wait()

with hang_watch(Path({str(tmp_path)!r}), 3, 0.01):
    with not_watched():
        threading.Event().wait(0.9)  # past the limit
    waiting_for_a_collective_that_never_comes()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=100)
    assert done.returncode == 1
    told = (tmp_path / "hang-rank-3.txt").read_text()
    assert "waiting_for_a_collective_that_never_comes" in told
    # The process that is started in its place keeps it.
    with hang_watch(tmp_path, 3, 10):
        pass
    (kept,) = tmp_path.glob("hang-rank-3*")
    assert kept.read_text() == told


def test_a_run_that_ends_leaves_no_word_of_a_hang(tiny_recipe: Write) -> None:
    outcome, _ = run(tiny_recipe(steps=2))
    assert not list(outcome.run.glob("hang-*"))


def test_a_step_taken_again_is_the_step_that_was(tiny_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, _ = run(tiny_recipe(steps=12, checkpoints__every=4, **STRICT))
    for line in (x for x in steps_of(outcome.run) if x["step"] in (1, 6, 12)):
        again = replay(outcome.run, line["step"], lambda _: None)
        assert again.result.loss == line["loss"]
        assert again.result.grad_norm == line["grad_norm"]
        assert again.result.grad_norms == line["grad_norms"]
        assert math.hypot(*again.result.grad_norms.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert [part.start for part, _ in again.micro_batches] == [8 * (line["step"] - 1) + n for n in (0, 2, 4, 6)]
    assert main(["replay", str(outcome.run), "--step", "6"]) == 0
    shown = capsys.readouterr()
    assert "step 5 again, on the way to 6" in shown.err
    assert "blocks.1" in shown.out
    assert main(["replay", str(outcome.run), "--step", "13"]) == 2
    assert "has recorded no step 13; its steps are 1 to 12" in capsys.readouterr().err


def test_steps_that_the_record_lacks_cannot_be_taken_on_the_way(tiny_recipe: Write) -> None:
    outcome, _ = run(tiny_recipe(steps=6, checkpoints__every=3, sample__prompt=""))
    path = outcome.run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] not in (2, 5)]
    path.write_text("".join(lines))
    with pytest.raises(TrainingError, match=r"step 3 cannot .* before it is none, and .* holds no step 2 of those"):
        replay(outcome.run, 3, lambda _: None)
    with pytest.raises(TrainingError, match=r"step 6 cannot .* is of step 3, and .* holds no step 5 of those"):
        replay(outcome.run, 6, lambda _: None)
    assert replay(outcome.run, 4, lambda _: None).step == 4


def test_an_incident_that_cannot_be_kept_ends_nothing(tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(health, "save_incident", full)
    outcome, told = run(tiny_recipe(steps=12, checkpoints__every=2, **STRICT))
    assert outcome.step == 12
    assert "what it worked on could not be kept: [Errno 28] No space left" in told


def test_how_a_run_is_spread_and_watched_may_change_when_it_goes_on(tiny_recipe: Write) -> None:
    """And one that had finished is unfinished again while more steps are to come."""
    first, _ = run(tiny_recipe(steps=3))
    longer = ("--steps", "6", "--run_directory", str(first.run), "--health.hang_minutes", "0", "--health.spike", "none")
    again, _ = run(tiny_recipe(), *longer, "--activation_checkpointing.mode", "full", "--parallel.reduce", "every")
    assert (again.run, again.step) == (first.run, 6)


def test_what_is_taken_for_hung_or_slow_may_change_when_an_unfinished_run_goes_on(tiny_recipe: Write) -> None:
    recipe = load_recipe(str(tiny_recipe()))
    run = choose_run_directory(recipe)
    run.mkdir(parents=True)
    save_recipe(run, recipe)
    other = Health(hang_minutes=5.0, stop_seconds=60.0, slow_rank=0.5)
    assert choose_run_directory(dataclasses.replace(recipe, health=other)) == run


def test_a_checkpoint_that_came_due_at_a_skipped_step_is_taken_after_the_next_good_one(tiny_recipe: Write) -> None:
    outcome, _ = run(tiny_recipe(steps=12, checkpoints__every=2, checkpoints__keep=99, **STRICT))
    skipped = {line["step"] for line in steps_of(outcome.run) if line["skipped"]}
    good = [step for step in range(1, 13) if step not in skipped]
    due = {min((step for step in good if step >= n), default=12) for n in range(2, 12, 2)} | {12}
    assert {int(path.name[5:]) for path in (outcome.run / "checkpoints").iterdir()} == due
