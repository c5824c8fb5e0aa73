"""The record of a run: what stands in it after steps, evaluations, crashes and resumptions."""

import json
import math
import os

import pytest

from tilewright.trainer import TrainingError
from tilewright.trainer.record.metrics import Metrics, read_metrics


def line(step, **changes):
    return {
        "step": step,
        "loss": 4.0 - step / 100,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 1024 * step,
        "sample": 0,
        "sequences": 8,
        "sequence_length": 32,
        "tokens_per_second": 7000.0,
        "tokens_per_second_since_start": 6000.0,
        "mfu": 0.4,
        "hfu": 0.5,
        "peak_memory_bytes": 10**9,
        "memory": {"parameters": 4000, "activations": None},
        "data_wait": 0.01,
        "checkpoint_in_flight": False,
        "grad_norms": {"embedding": 0.6, "blocks.0": 0.8},
        "seconds": {"forward": 0.25, "backward": 0.5},
        "skipped": False,
        "profiled": False,
        "slowest_rank": 1,
        "slowest_behind": 0.05,
        **changes,
    }


def result(bits=2.0):
    return {"heldout": {"loss": 3.5, "perplexity": math.exp(3.5), "bits_per_byte": bits, "tokens": 4096}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def record(tmp_path):
    """Record some steps, with an evaluation after those in `evaluated`, as a process does that starts at `resume`."""

    def run(steps, *, resume=0, evaluated=(), bits=2.0):
        metrics = Metrics(tmp_path, resume_step=resume)
        for step in steps:
            metrics.train(**line(step))
            if step in evaluated:
                metrics.evaluation(step, result(bits))
        metrics.close()

    return run


def events(folder):
    """Scalars by tag as TensorBoard shows them: (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_line_holds_exactly_the_fields_and_reads_back_equal(record, path):
    record([1, 2, 3], evaluated=[2])
    training, evaluations = read_metrics(path)
    assert training == [line(1), line(2), line(3)]
    assert evaluations == [{"step": 2, "eval": result()}]
    assert len(path.read_text().splitlines()) == 4


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path, path):
    metrics = Metrics(tmp_path, resume_step=0)
    metrics.train(**line(1))
    assert read_metrics(path)[0] == [line(1)]
    metrics.evaluation(1, result())
    assert read_metrics(path)[1] == [{"step": 1, "eval": result()}]
    metrics.close()


def test_a_missing_field_is_an_error(tmp_path):
    metrics = Metrics(tmp_path, resume_step=0)
    incomplete = line(1)
    del incomplete["grad_norm"]
    with pytest.raises(KeyError, match="grad_norm"):
        metrics.train(**incomplete)
    metrics.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_left_out_of_tensorboard(tmp_path, path, value):
    metrics = Metrics(tmp_path, resume_step=0)
    metrics.train(**line(1, loss=value, mfu=None))
    metrics.evaluation(1, {"heldout": {"loss": value, "perplexity": 2.0}})
    metrics.close()
    first, second = (json.loads(text, parse_constant=pytest.fail) for text in path.read_text().splitlines())
    assert first == line(1, loss=None, mfu=None)
    assert second["eval"]["heldout"] == {"loss": None, "perplexity": 2.0}
    shown = events(tmp_path / "tensorboard")
    assert {"train/loss", "train/mfu", "eval/heldout/loss"}.isdisjoint(shown)
    assert shown["eval/heldout/perplexity"] == [(1, 2.0)]


def test_resuming_drops_what_was_written_after_the_checkpoint_so_that_each_step_stands_once(record, path):
    record(range(1, 8), evaluated=[2, 4, 6])
    record(range(5, 9), resume=4, evaluated=[6, 8], bits=1.5)
    training, evaluations = read_metrics(path)
    assert [entry["step"] for entry in training] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(entry["step"], entry["eval"]["heldout"]["bits_per_byte"]) for entry in evaluations] == [
        (2, 2.0),
        (4, 2.0),
        (6, 1.5),
        (8, 1.5),
    ]


def test_a_run_that_starts_anew_keeps_no_step_of_the_old_one(record, path):
    record([1, 2])
    record([1], resume=0)
    assert read_metrics(path) == ([line(1)], [])


def test_an_evaluation_made_again_after_resuming_takes_the_place_of_the_first(tmp_path, path):
    for bits in (8.0, 7.5):
        metrics = Metrics(tmp_path, resume_step=0)
        metrics.evaluation(0, result(bits))
        metrics.train(**line(1))
        metrics.close()
    assert read_metrics(path) == ([line(1)], [{"step": 0, "eval": result(7.5)}])


def test_an_evaluation_of_a_step_leaves_its_training_line(tmp_path, path):
    metrics = Metrics(tmp_path, resume_step=0)
    metrics.train(**line(1))
    metrics.evaluation(1, result(3.0))
    metrics.evaluation(1, result(2.0))
    metrics.train(**line(2))
    metrics.close()
    assert read_metrics(path) == ([line(1), line(2)], [{"step": 1, "eval": result(2.0)}])


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0\0", "[3]\n", '{"step": "3"}\n']
)
def test_a_torn_last_line_is_dropped(record, path, torn):
    record([1, 2])
    with path.open("a") as file:
        file.write(torn)
    assert read_metrics(path)[0] == [line(1), line(2)]
    record([3], resume=5)
    assert path.read_text() == "".join(json.dumps(line(step)) + "\n" for step in (1, 2, 3))


def test_a_record_that_needs_no_mending_is_not_written_again(record, path):
    record([1, 2])
    before = path.stat().st_ino
    record([3], resume=2)
    assert path.stat().st_ino == before


def test_mending_replaces_the_whole_file_at_once_and_leaves_nothing_beside_it(record, path, monkeypatch):
    record([1, 2, 3])
    whole = path.read_text()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(TrainingError, match="Input/output error"):
        record([], resume=1)
    assert path.read_text() == whole
    monkeypatch.undo()
    record([], resume=1)
    assert read_metrics(path)[0] == [line(1)]
    assert {entry.name for entry in path.parent.iterdir() if "partial" not in entry.name} == {path.name, "tensorboard"}


def test_tensorboard_shows_every_figure_and_each_step_once_after_resuming(record, tmp_path):
    record(range(1, 5), evaluated=[2, 4])
    record(range(3, 6), resume=2, evaluated=[4], bits=1.5)
    shown = events(tmp_path / "tensorboard")
    plain = {name for name, value in line(1).items() if name != "step" and not isinstance(value, dict)}
    parts = {"grad_norms/embedding", "grad_norms/blocks.0", "seconds/forward", "seconds/backward", "memory/parameters"}
    assert set(shown) == {f"train/{name}" for name in plain | parts} | {
        f"eval/heldout/{name}" for name in result()["heldout"]
    }
    assert shown["train/loss"] == [(step, 4.0 - step / 100) for step in (1, 2, 3, 4, 5)]
    assert shown["eval/heldout/bits_per_byte"] == [(2, 2.0), (4, 1.5)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_named_with_its_mend(tmp_path):
    metrics = Metrics(tmp_path, resume_step=0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: No space left on device; free some space"):
        metrics.train(**line(1))


def test_a_run_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match="no-such-run"):
        Metrics(tmp_path / "no-such-run", resume_step=0)


def test_reading_a_missing_record_says_what_to_name(tmp_path):
    with pytest.raises(TrainingError, match=r"there is no .*metrics\.jsonl; name a run directory"):
        read_metrics(tmp_path / "metrics.jsonl")
