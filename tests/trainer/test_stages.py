"""Steps that grow: a ramp of the batch and a warm-up of the sequence length, exact over kills, sizes and replays."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from tilewright.corpus import Batch as Rows
from tilewright.model import Transformer, from_preset, initialise
from tilewright.trainer import TrainingError, loop
from tilewright.trainer.checkpoints.checkpoint import committed
from tilewright.trainer.data import open_data, samples_of
from tilewright.trainer.plan.dry_run import plan
from tilewright.trainer.recipe import Batch, BatchStage, Data, LengthStage
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.replay import replay
from tilewright.trainer.stages import DataPosition, check_batches, length_at, samples_before, sequences_at
from tilewright.trainer.step import MicroBatch

from .conftest import Write, run, steps_of

pytestmark = pytest.mark.usefixtures("without_what_takes_long")
RAMP = Batch(4, 2, [BatchStage(2, 8), BatchStage(5, 16)])
# Steps of 4, 4, 8, 8, 8, 16 sequences of 32 tokens, cut to 8 tokens in the first three and to 16 in the fourth.
STAGED = {
    "batch__sequences": 4,
    "batch__stages": [{"step": 2, "sequences": 8}, {"step": 5, "sequences": 16}],
    "data__sequence_length_stages": [{"step": 0, "length": 8}, {"step": 3, "length": 16}, {"step": 4, "length": 32}],
}


def test_a_step_takes_the_samples_after_those_of_the_steps_before() -> None:
    sizes = [sequences_at(RAMP, step) for step in range(7)]
    assert sizes == [4, 4, 8, 8, 8, 16, 16]
    assert [samples_before(RAMP, step) for step in range(8)] == [sum(sizes[:step]) for step in range(8)]
    data = Data(sequence_length=32, sequence_length_stages=[LengthStage(1, 8), LengthStage(3, 32)])
    assert [length_at(data, step) for step in range(5)] == [32, 8, 8, 32, 32]


def test_a_position_goes_on_from_wherever_a_checkpoint_says() -> None:
    position = DataPosition(RAMP)
    assert [position.first_sample(step) for step in (0, 3, 6)] == [0, 16, 48]
    (stored,) = position.state(3).values()
    position.go_on(2, 100)
    assert [position.first_sample(step) for step in (2, 3, 6)] == [100, 108, 140]
    stored.fill_(16)
    position.loaded(3, stored=True)
    assert position.first_sample(4) == 24
    position.loaded(3, stored=False)  # of a run before there were stages
    assert position.first_sample(4) == 3 * 4 + 8


@pytest.mark.parametrize("across_documents", [False, True])
@pytest.mark.parametrize("preset", ["llama-10m", "gpt2"])
def test_the_pieces_of_a_sample_are_as_sequences_of_their_own(preset: str, across_documents: bool) -> None:
    config = from_preset(
        preset, vocab_size=40, hidden_size=16, layers=2, heads=2, kv_heads=2, head_dim=8, intermediate_size=24,
        max_sequence_length=12, initial_std=0.3,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, 5)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 13))
    rows = Rows(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.array([0, 5, 12, 14, 24], dtype=np.int32))
    pieces = Rows(
        rows.inputs.reshape(6, 4),
        rows.targets.reshape(6, 4),
        np.array([0, 4, 5, 8, 12, 14, 16, 20, 24], dtype=np.int32),
    )

    def loss_and_gradient(batch: Rows, length: int | None) -> tuple[float, torch.Tensor]:
        micro = MicroBatch.of(batch, torch.device("cpu"), across_documents=across_documents, length=length)
        model.zero_grad()
        loss = model(micro.inputs, micro.targets, micro.cu_seqlens)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    cut, apart, whole = (loss_and_gradient(*case) for case in ((rows, 4), (pieces, None), (rows, None)))
    assert cut[0] == pytest.approx(apart[0], rel=1e-6)
    torch.testing.assert_close(cut[1], apart[1], rtol=1e-5, atol=1e-5)
    assert abs(cut[0] - whole[0]) > 1e-3 * whole[0]
    assert loss_and_gradient(rows, 12)[0] == whole[0]


def test_a_run_with_stages_records_what_each_step_took(tiny_recipe: Write) -> None:
    outcome, told = run(tiny_recipe(**STAGED))
    lines = steps_of(outcome.run)
    assert [line["sample"] for line in lines] == [0, 4, 8, 16, 24, 32]
    assert [line["sequences"] for line in lines] == [4, 4, 8, 8, 8, 16]
    assert [line["sequence_length"] for line in lines] == [8, 8, 8, 16, 32, 32]
    assert [line["tokens"] for line in lines] == [32 * n for n in (4, 8, 16, 24, 32, 48)]
    assert "128 tokens, cut into pieces of 8; after step 2: 256 tokens; after step 3: pieces of 16" in told
    # What a token costs grows with the length that it sees.
    model = load_recipe(str(tiny_recipe())).model
    for line in lines:
        flops = line["tokens_per_second"] * model.flops_per_token(line["sequence_length"])
        assert line["mfu"] == pytest.approx(flops / 1e12)
    summary = json.loads((outcome.run / "summary.json").read_text())
    assert summary["tokens"] == 48 * 32
    assert summary["seconds"] == pytest.approx(
        sum(32 * line["sequences"] / line["tokens_per_second"] for line in lines)
    )
    for step in (1, 3, 6):
        again = replay(outcome.run, step, lambda _: None)
        assert again.result.loss == lines[step - 1]["loss"]
        assert again.result.grad_norm == lines[step - 1]["grad_norm"]


def test_a_run_with_stages_that_is_killed_and_resumed_at_other_sizes_trains_on_each_sample_once(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed with another micro-batch and read ahead otherwise; the losses are those of a run never killed."""
    recipe = tiny_recipe(**STAGED)
    whole, _ = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    step, trained, calls = loop.train_step, [], 0

    def recorded(model: Any, optimizer: Any, micro_batches: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        trained.append([row.tolist() for micro in micro_batches for row in micro.inputs])
        return step(model, optimizer, micro_batches, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", recorded)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert len(trained) == 5
    del trained[4:]  # the checkpoint is that of step 4
    resumed, _ = run(recipe, "--batch.micro_batch", "4", "--data.prefetch", "1")
    assert resumed.run.name == "tiny-001"
    loaded = load_recipe(str(recipe))
    stream = open_data(loaded.data).train_stream(sequence_length=32, seed=loaded.seed)
    assert [row for rows in trained for row in rows] == stream.batch(range(48)).inputs.tolist()
    for a, b in zip(steps_of(resumed.run), steps_of(whole.run), strict=True):
        assert (a["sample"], a["tokens"]) == (b["sample"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_no_sample_is_lost_or_taken_twice_whatever_the_sizes_between_kills(seed: int) -> None:
    """Killed at random steps and resumed from the last checkpoint with other processes and another micro-batch."""
    draw = random.Random(seed)
    batch = Batch(24, 1, [BatchStage(draw.randint(1, 9), 48), BatchStage(draw.randint(10, 25), 24), BatchStage(30, 96)])
    checkpoint, step, taken = DataPosition(batch).state(0), 0, list[int]()
    while step < 40:
        position = DataPosition(batch)
        for name, stored in position.state(0).items():
            stored.copy_(checkpoint[name])
        position.loaded(step, stored=True)
        processes, micro_batch = draw.choice([1, 2, 3, 4, 6]), draw.choice([1, 2, 4])
        saved = min(step + draw.randint(0, 12), 40)
        for done in range(step, saved):  # those after `saved` are lost with the process
            first, sequences = position.first_sample(done), sequences_at(batch, done)
            for rank in range(processes):
                parts = samples_of(first, sequences, rank=rank, processes=processes, micro_batch=micro_batch)
                taken += [sample for part in parts for sample in part]
        checkpoint, step = {name: stored.clone() for name, stored in position.state(saved).items()}, saved
    assert taken == list(range(samples_before(batch, 40)))


def test_a_named_run_may_take_a_larger_batch_from_where_it_stands(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(schedule__kind="constant")
    name = ("--run_directory", str(recipe.parent / "named"))
    run(recipe, *name, "--steps", "2")
    outcome, _ = run(recipe, *name, "--steps", "4", "--batch.stages", "[{step: 1, sequences: 16}]")
    # The first two steps took 8 each, whatever the recipe says of them now.
    assert [(line["sample"], line["sequences"]) for line in steps_of(outcome.run)] == [
        (0, 8),
        (8, 8),
        (16, 16),
        (32, 16),
    ]


def test_a_checkpoint_from_before_the_position_was_kept_goes_on_where_it_was(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(schedule__kind="constant")
    name = ("--run_directory", str(recipe.parent / "named"))
    with monkeypatch.context() as older:
        older.setattr(DataPosition, "state", lambda self, step: {})
        run(recipe, *name, "--steps", "3")
    outcome, _ = run(recipe, *name, "--steps", "4")
    assert steps_of(outcome.run)[-1]["sample"] == 24
    assert [checkpoint.step for checkpoint in committed(outcome.run)] == [3, 4]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"batch__stages": [{"step": 0, "sequences": 8}]},
            r"batch.stages begin at the steps \[0\]; these must be 1 or",
        ),
        (
            {"batch__stages": [{"step": 4, "sequences": 8}, {"step": 2, "sequences": 8}]},
            r"batch.stages begin at the steps \[4, 2\]; these must be 1 or more, and rising",
        ),
        ({"batch__stages": [{"step": 4, "sequences": 0}]}, r"batch.stages\[0\].sequences is 0; it must be 1 or more"),
        (
            {"data__sequence_length_stages": [{"step": 0, "length": 12}]},
            r"sequence_length_stages\[0\].length is 12, which does not divide data.sequence_length \(32\); set it to 8",
        ),
        (
            {"batch__stages": [{"step": 4, "sequence": 8}]},
            r"batch.stages\[0\].sequence",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_by_name(tiny_recipe: Write, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        load_recipe(str(tiny_recipe(**changes)))


def test_every_stage_must_divide_over_the_processes() -> None:
    check_batches(RAMP, 2)
    with pytest.raises(TrainingError, match=r"batch.stages\[0\].sequences is 6, which 4 processes do not divide"):
        check_batches(Batch(8, 2, [BatchStage(2, 6)]), 4)
    with pytest.raises(
        TrainingError, match=r"does not divide the 3 sequences .* \(batch.stages\[0\].sequences 6 over 2\)"
    ):
        check_batches(Batch(8, 2, [BatchStage(2, 6)]), 2)


def test_a_plan_is_of_the_largest_stage(tiny_recipe: Write) -> None:
    assert plan(load_recipe(str(tiny_recipe(**STAGED))), "2xH100").micro_batches == 4
