"""Whole training steps: the grid, the rounds of a place, and the columns of the record."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tilewright.benchmarks.training import conftest, grid, steps
from tilewright.benchmarks.training.grid import Place, Setting, places
from tilewright.benchmarks.training.steps import Measured, measure, measure_here
from tilewright.benchmarks.training.test_training import columns_of, memory_lacking, provider_of, sample_of
from tilewright.benchmarks.training.workload import Workload
from tilewright.model import transformer
from tilewright.model.transformer import Block
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel.sharding import World, world
from tilewright.trainer.step import StepResult


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    sizes = {"vocab_size": 64, "hidden_size": 16, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 8}
    monkeypatch.setitem(grid.MODELS, "tiny", ("llama-10m", {**sizes, "intermediate_size": 256}))
    monkeypatch.setattr(steps, "_matmul_peak", lambda *_: 1e12)
    with world() as alone:
        yield alone


def tiny(*settings: Setting, world_size: int = 1) -> Place:
    return Place("tiny", 32, world_size, settings)


@pytest.mark.parametrize(("device_type", "most", "quick"), itertools.product(("cpu", "cuda"), (1, 2, 8), (True, False)))
def test_no_row_is_measured_twice_and_every_recipe_fits_its_processes(device_type: str, most: int, quick: bool) -> None:
    chosen = list(places(device_type, most, quick=quick))
    rows = [(sample_of(place, setting), provider_of(setting)) for place in chosen for setting in place.settings]
    assert len(set(rows)) == len(rows)
    assert {place.world_size for place in chosen} <= {1, 2, 4, 8}
    assert max(place.world_size for place in chosen) == (min(most, 2) if quick else most)
    for place in chosen:
        assert place.recipe.batch.sequences % place.world_size == 0
        assert place.config.max_sequence_length == place.sequence_length


def test_the_grid_varies_all_that_it_is_about() -> None:
    for device_type in ("cpu", "cuda"):
        chosen = list(places(device_type, 2, quick=False))
        settings = [setting for place in chosen for setting in place.settings]
        assert len({place.model for place in chosen}) > 1
        assert len({place.sequence_length for place in chosen}) > 1
        for column in Setting._fields:
            assert len({getattr(setting, column) for setting in settings}) > 1, column


def test_settings_of_a_place_are_the_same_step_and_checkpointing_saves_memory(processes: World) -> None:
    place = tiny(Setting(8), Setting(2, 4), Setting(8, checkpointing="full"), Setting(4))
    whole, split, again, half = measure_here(place, processes, 6)
    assert [row.refused for row in (whole, split, again, half)] == [""] * 4
    assert whole.loss == pytest.approx(split.loss, rel=1e-5)
    assert whole.loss == pytest.approx(again.loss, rel=1e-5)
    assert whole.loss != pytest.approx(half.loss, rel=1e-5), "half of the sequences are another step"
    assert again.peak_memory_bytes < 0.8 * whole.peak_memory_bytes
    assert split.peak_memory_bytes < 0.8 * whole.peak_memory_bytes
    assert [len(row.seconds) for row in (whole, split, again, half)] == [6] * 4
    assert whole.compile_seconds is None


def test_each_mode_of_checkpointing_is_the_trainers_own(processes: World, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    once, step = Block.forward, Workload.step
    calls: list[int] = []

    def counted(workload: Workload, *arguments: int) -> StepResult:
        calls.clear()
        result = step(workload, *arguments)
        taken.append((workload.recipe.activation_checkpointing.mode, len(calls)))
        return result

    monkeypatch.setattr(Block, "forward", lambda *inputs: calls.append(1) or once(*inputs))
    monkeypatch.setattr(Workload, "step", counted)
    settings = (Setting(2), Setting(2, checkpointing="selective"), Setting(2, checkpointing="full"))
    plain, selective, full = measure_here(tiny(*settings), processes, 6)
    assert set(taken) == {("none", 3), ("selective", 6), ("full", 6)}, "of three blocks"
    assert full.peak_memory_bytes < selective.peak_memory_bytes < plain.peak_memory_bytes
    assert plain.loss == selective.loss == full.loss


def test_modes_that_concern_a_whole_process_or_fill_its_memory_have_places_of_their_own() -> None:
    for device_type in ("cpu", "cuda"):
        for place in places(device_type, 1, quick=False):
            assert "budget" not in place.modes or place.modes == ["budget"]
            assert device_type == "cpu" or len(place.modes) == 1


def test_a_setting_that_computes_something_else_or_runs_out_of_memory_has_no_time(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = transformer.swiglu

    def broken(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            raise torch.OutOfMemoryError("no memory left")
        return 4 * right(x) if x.shape[0] == 2 else right(x)

    monkeypatch.setattr(transformer, "swiglu", broken)
    whole, wrong, full, again = measure_here(
        tiny(Setting(4), Setting(2, 2), Setting(1, 4), Setting(4, checkpointing="full")), processes, 6
    )
    assert wrong.refused.startswith("refused: its ")
    assert full.refused == steps.OUT_OF_MEMORY
    assert (wrong.seconds, full.seconds) == ([], [])
    assert len(whole.seconds) == len(again.seconds) == 6
    assert whole.loss == again.loss, "what follows a failed step is a whole step again"


def test_two_processes_take_the_same_step_as_one() -> None:
    pair = measure(Place("1M", 16, 2, (Setting(1),)), 6, "cpu")
    (alone,) = measure(Place("1M", 16, 1, (Setting(2),)), 6, "cpu")
    (both,) = pair
    assert both.loss == pytest.approx(alone.loss, rel=1e-4)
    assert both.peak_memory_bytes < alone.peak_memory_bytes
    assert len(both.seconds) == 6


def test_processes_that_fail_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "something\nlast words")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(TrainingError, match=r"the steps of tiny, 32 tokens, 1 process failed:\nsomething\nlast words"):
        measure(tiny(Setting(1)), 6, "cpu")


def test_columns_follow_from_the_seconds() -> None:
    place = Place("1M", 256, 2, (Setting(2, 3),))
    measured = Measured(place.settings[0], [2.0, 1.0, 4.0, 3.0, 2.0, 2.0], peak_memory_bytes=5, peak_flops=1e9)
    columns = columns_of(place, measured)
    tokens = 2 * 3 * 2 * 256
    assert columns["tokens_per_second"] == tokens / 2
    assert columns["mfu"] == pytest.approx(tokens / 2 * place.config.flops_per_token(256) / 1e9)
    assert columns["interval_seconds"] == [1.0, 4.0]
    # The tied embedding; 2 blocks of qkv, out, gate_up, down and two norms; the last norm. 16 bytes each, over 2.
    parameters = 4096 * 128 + 2 * (128 * (3 * 128 + 128 + 3 * 352) + 2 * 128) + 128
    assert columns["algorithm_memory_bytes"] == 16 * parameters // 2
    json.dumps(columns)


def test_mfu_is_refused_where_the_peak_is_unknown() -> None:
    place = Place("1M", 256, 1, (Setting(1),))
    columns = columns_of(place, Measured(place.settings[0], [1.0] * 6))
    assert columns["mfu"] is None
    assert columns["share_of_measured_peak"] is None


def test_a_model_whose_state_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.benchmarks.training import test_training

    place = Place("8B", 8192, 1, (Setting(1),))
    monkeypatch.setattr(test_training, "memory_bytes", lambda device: 80 * 10**9)
    assert memory_lacking(place, torch.device("cpu")) == (
        "a process needs 128 GB for weights, gradients and moments; there are 80 GB"
    )
    monkeypatch.setattr(test_training, "memory_bytes", lambda device: 200 * 10**9)
    assert memory_lacking(place, torch.device("cpu")) == ""


def test_the_record_says_what_the_columns_mean() -> None:
    record: dict[str, Any] = {"tilewright_record": {"definitions": {"mfu": "of kernels"}}}
    conftest.pytest_benchmark_update_json(record)
    assert {"mfu", "tokens_per_second", "training step: mfu"} <= set(record["tilewright_record"]["definitions"])
    conftest.pytest_benchmark_update_json({})
