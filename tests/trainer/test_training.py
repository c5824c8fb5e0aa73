"""Whole runs of a tiny recipe in one process: what they leave behind, and that stopping changes nothing."""

import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.corpus import build_corpus
from tilewright.trainer import TrainingError, loop
from tilewright.trainer.checkpoints import writer as checkpoint_writer
from tilewright.trainer.checkpoints.checkpoint import CheckpointWriter, committed
from tilewright.trainer.health.interruption import Interruption
from tilewright.trainer.recipe.file import load_recipe, recipe_from_run
from tilewright.trainer.record.metrics import TrainingLine, read_metrics
from tilewright.trainer.trained import load_trained

from .conftest import Write, kill_in_step, run


def lines(run_directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return read_metrics(run_directory / "metrics.jsonl")


def test_a_run_leaves_its_whole_record(tiny_recipe: Write, tiny_corpus: Path) -> None:
    outcome, _ = run(tiny_recipe())
    assert (outcome.status, outcome.step) == ("finished", 6)
    assert {p.name for p in outcome.run.iterdir()} >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json", "report.html",
    }  # fmt: skip
    steps, evaluations = lines(outcome.run)
    assert all(list(line) == list(TrainingLine.__annotations__) for line in steps)
    assert all(0 <= line["data_wait"] < 1 for line in steps)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in steps] == [8 * 32 * step for step in range(1, 7)]
    assert [line["lr"] for line in steps][:2] == pytest.approx([5e-3, 1e-2])
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    for line in evaluations:
        scores = line["eval"]["heldout"]
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert evaluations[-1]["eval"]["heldout"]["loss"] < evaluations[0]["eval"]["heldout"]["loss"]
    summary = json.loads((outcome.run / "summary.json").read_text())
    assert summary["heldout"]["bytes"] == sum(
        len(json.loads(line)["text"].encode()) for line in (tiny_corpus / "documents" / "heldout.jsonl").open()
    )
    assert summary["heldout"]["xz_bits_per_byte"] > 0
    assert summary["sample"]["prompt"] == "the quick"


def test_an_untrained_model_knows_nothing(tiny_recipe: Write) -> None:
    """Before the first step the loss is that of guessing among the vocabulary, in nats and in bits per byte."""
    outcome, _ = run(tiny_recipe(steps=1, evaluation__windows=0, schedule__warmup_steps=0))
    first = lines(outcome.run)[1][0]["eval"]["heldout"]
    assert first["loss"] == pytest.approx(math.log(320), rel=0.01)
    text_bytes = json.loads((outcome.run / "summary.json").read_text())["heldout"]["bytes"]
    assert first["bits_per_byte"] == pytest.approx(first["loss"] * first["tokens"] / math.log(2) / text_bytes)


def losses(run_directory: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(run_directory)[0]]


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_losses_to_the_bit(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    whole, _ = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    kill_in_step(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.undo()
    interrupted = recipe.parent / "runs" / "tiny-001"
    assert [checkpoint.step for checkpoint in committed(interrupted)] == [2, 4]
    assert [line["step"] for line in lines(interrupted)[0]] == [1, 2, 3, 4, 5]
    outcome, _ = run(recipe)
    assert outcome.run == interrupted
    assert [line["step"] for line in lines(interrupted)[0]] == [1, 2, 3, 4, 5, 6]
    assert losses(interrupted) == losses(whole.run)
    assert lines(interrupted)[1] == lines(whole.run)[1]


@pytest.fixture
def sigint_is_heard() -> Iterator[None]:
    """A shell that starts these tests in the background has them ignore SIGINT, which would then stay so."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("sigint_is_heard")
def test_ctrl_c_ends_the_step_writes_a_checkpoint_and_the_same_command_goes_on(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(checkpoints__every=0)
    whole, _ = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    step = loop.train_step

    def with_ctrl_c(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", with_ctrl_c)
    stopped, _ = run(recipe)
    monkeypatch.undo()
    assert (stopped.status, stopped.step) == ("stopped", 1)
    assert [checkpoint.step for checkpoint in committed(stopped.run)] == [1]
    assert stopped.report.is_file()
    finished, _ = run(recipe)
    assert (finished.run, finished.status) == (stopped.run, "finished")
    assert losses(finished.run) == losses(whole.run)


def test_steps_that_begin_while_a_checkpoint_is_written_are_marked_and_the_end_says_what_they_took(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a checkpoint is written when somebody waits for it: that of step 2 when that of step 4 comes."""
    waited_for, write, wait = threading.Event(), checkpoint_writer.dcp_save, CheckpointWriter.wait
    monkeypatch.setattr(
        checkpoint_writer,
        "dcp_save",
        lambda *args, **options: (waited_for.wait(10) and waited_for.clear()) or write(*args, **options),
    )
    monkeypatch.setattr(
        CheckpointWriter, "wait", lambda writer: (writer.in_flight and waited_for.set()) or wait(writer)
    )
    outcome, output = run(tiny_recipe(checkpoints__every=2), "--steps", "4")
    steps, _ = lines(outcome.run)
    assert [line["checkpoint_in_flight"] for line in steps] == [False, False, True, True]
    told = json.loads((outcome.run / "summary.json").read_text())["step_seconds"]
    seconds = [8 * 32 / line["tokens_per_second"] for line in steps]
    assert told["checkpoint_in_flight"] == pytest.approx(sum(seconds[2:]) / 2)
    assert told["otherwise"] == pytest.approx(sum(seconds[:2]) / 2)
    assert re.search(r"a step took [\d,]+ ms while a checkpoint was being written and [\d,]+ ms otherwise", output)


def test_a_finished_run_is_left_alone_and_the_next_gets_a_directory_of_its_own(tiny_recipe: Write) -> None:
    recipe = tiny_recipe()
    first, _ = run(recipe)
    second, _ = run(recipe)
    assert (first.run.name, second.run.name) == ("tiny-001", "tiny-002")
    assert losses(first.run) == losses(second.run)


def test_an_unfinished_run_of_another_recipe_is_not_gone_on_with(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    monkeypatch.setattr(loop, "train_step", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.undo()
    outcome, _ = run(recipe, "--optimizer.learning_rate", "2e-2")
    assert outcome.run.name == "tiny-002"
    with pytest.raises(TrainingError, match=r"tiny-001 holds a run of another recipe \(seed differ"):
        run(recipe, "--seed", "2", "--run_directory", str(recipe.parent / "runs" / "tiny-001"))


def test_a_directory_that_another_command_trains_in_is_refused(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    step = loop.train_step

    def train_again_meanwhile(*args: Any, **options: Any) -> Any:
        with (
            pytest.raises(TrainingError, match="another command is training in"),
            loop.locked(recipe.parent / "runs" / "tiny-001"),
        ):
            pass
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", train_again_meanwhile)
    assert run(recipe)[0].status == "finished"


def test_the_resolved_recipe_is_saved_beside_the_checkpoints(tiny_recipe: Write) -> None:
    recipe = tiny_recipe()
    outcome, _ = run(recipe, "--steps", "2")
    assert recipe_from_run(outcome.run / "recipe.yaml") == load_recipe(str(recipe), ["--steps", "2"])


def test_a_checkpoint_right_after_an_evaluation_is_whole(tiny_recipe: Write) -> None:
    """Both fall on step 3, where the evaluation has just gathered the parameters."""
    outcome, _ = run(tiny_recipe(checkpoints__every=3, evaluation__every=3))
    assert [checkpoint.step for checkpoint in committed(outcome.run)] == [3, 6]


def test_samples_do_not_depend_on_the_micro_batch(tiny_recipe: Write) -> None:
    """The step's tokens are the same however they are cut; the losses then differ by rounding alone."""
    recipe = tiny_recipe()
    two, _ = run(recipe)
    four, _ = run(recipe, "--batch.micro_batch", "4")
    for a, b in zip(losses(two.run), losses(four.run), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert losses(two.run) != losses(four.run)


def test_gpt2_style_models_and_crossing_documents_train_too(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(model__preset="gpt2", model__kv_heads=2, data__across_documents=True)
    outcome, _ = run(recipe)
    evaluations = lines(outcome.run)[1]
    assert evaluations[-1]["eval"]["heldout"]["loss"] < evaluations[0]["eval"]["heldout"]["loss"]


def test_a_corpus_built_anew_in_the_same_place_is_told_from_the_one_trained_on(
    tiny_recipe: Write, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    recipe = tiny_recipe(data__corpus=str(corpus))
    kill_in_step(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.undo()
    first = recipe.parent / "runs" / "tiny-001"
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.txt").write_text(f"other words than before number {number} " * 60)
    build_corpus(source, corpus, suffixes=[".txt"], vocab_size=300, held_out_fraction=0.2)
    with pytest.raises(TrainingError, match=r"tiny-001 was trained on another corpus than the one that is now in"):
        load_trained(first, torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"was trained on another corpus"):
        run(recipe, "--run_directory", str(first))
    outcome, _ = run(recipe)
    assert outcome.run.name == "tiny-002"


def test_a_run_that_diverges_stops_before_it_spoils_its_checkpoints(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(checkpoints__every=1)
    with pytest.raises(TrainingError, match=r"training diverged: the gradient's norm is (nan|inf);"):
        run(recipe, "--optimizer.learning_rate", "1e18")
    kept = committed(recipe.parent / "runs" / "tiny-001")
    assert kept
    trained = load_trained(kept[-1].path.parent.parent, torch.device("cpu"))
    assert all(p.isfinite().all() for p in trained.model.parameters())


def test_names_with_glob_characters_get_directories_of_their_own(tiny_recipe: Write) -> None:
    recipe = tiny_recipe(steps=2, name="exp[1]")
    assert [run(recipe)[0].run.name for _ in range(2)] == ["exp[1]-001", "exp[1]-002"]


def test_an_ignored_hangup_stays_ignored() -> None:
    """``nohup`` ignores SIGHUP so that a run outlives its terminal."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, previous)
