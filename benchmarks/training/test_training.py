"""Whole optimizer steps over model, sequence, micro-batch, accumulation, checkpointing, compilation, processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tilewright.benchmarks.kernels.replay import recorded_clock, replay
from tilewright.benchmarks.measure import median_interval
from tilewright.benchmarks.record import Session, device_of
from tilewright.benchmarks.training.grid import Place, Setting, places, state_bytes_needed
from tilewright.benchmarks.training.steps import OUT_OF_MEMORY, Measured, measure
from tilewright.benchmarks.training.workload import memory_bytes
from tilewright.trainer.errors import TrainingError

_ROUNDS = {"quick": 7}
# What came of the place that was measured last: its rows follow one another.
_MEASURED = pytest.StashKey[tuple[Place, dict[Setting, Measured]]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.config.getoption("suite")
    device = device_of(metafunc.config.getoption("device"))
    most = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    chosen = places(device.type, most, quick=suite == "quick") if suite != "kernels" else ()
    rows = [(place, setting) for place in chosen for setting in place.settings]
    ids = [f"training step-{sample_of(*row)}-{provider_of(row[1])}" for row in rows]
    metafunc.parametrize(("place", "setting"), rows, ids=ids)


@pytest.mark.benchmark(timer=recorded_clock)
def test_training_step(
    place: Place, setting: Setting, session: Session, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    who = {
        "op": "training step",
        "sample": sample_of(place, setting),
        "dtype": place.recipe.compute_dtype,
        "provider": provider_of(setting),
    }
    lacking = memory_lacking(place, session.device)
    if lacking:
        session.left_out.append({**who, "reason": lacking})
        pytest.skip(lacking)
    measured = _measured(place, session, request.config)[setting]
    if measured.refused:
        session.refused.append({**who, "reason": measured.refused})
        (pytest.skip if measured.refused == OUT_OF_MEMORY else pytest.fail)(measured.refused)
    columns = {**who, "pass": "step", "device": str(session.device), **columns_of(place, measured)}
    replay(benchmark, measured.seconds, columns)


def _measured(place: Place, session: Session, config: pytest.Config) -> dict[Setting, Measured]:
    """What came of each setting of a place, all of which are measured before the first reports."""
    if config.stash.get(_MEASURED, (None, {}))[0] != place:
        rounds = _ROUNDS.get(config.getoption("suite"), 11)
        try:
            rows = measure(place, rounds, session.device.type)
        except TrainingError as error:
            rows = [Measured(setting, refused=str(error)) for setting in place.settings]
        config.stash[_MEASURED] = place, {row.setting: row for row in rows}
    return config.stash[_MEASURED][1]


def sample_of(place: Place, setting: Setting) -> str:
    """A step's shape, all but whether it is compiled."""
    return f"{place}, {setting}"


def provider_of(setting: Setting) -> str:
    """As the kernels' benchmarks call them, so that the same pages and tables compare the two."""
    return "ours compiled" if setting.compile else "ours"


def columns_of(place: Place, measured: Measured) -> dict[str, Any]:
    """What a row of the record says of a step, beside its seconds."""
    setting = measured.setting
    median, low, high = median_interval(measured.seconds)
    tokens_per_second = setting.sequences * place.world_size * place.sequence_length / median
    flops_per_second = tokens_per_second * place.config.flops_per_token(place.sequence_length)
    mfu = flops_per_second / measured.peak_flops if measured.peak_flops else None
    return {
        "model": place.model,
        "sequence_length": place.sequence_length,
        "world_size": place.world_size,
        **setting._asdict(),
        "median_seconds": median,
        "interval_seconds": [low, high],
        "rounds": len(measured.seconds),
        "tokens_per_second": tokens_per_second,
        "flops_per_second": flops_per_second,
        "mfu": mfu,
        "share_of_measured_peak": mfu,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "algorithm_memory_bytes": state_bytes_needed(place),
        "compile_seconds": measured.compile_seconds,
        "loss": measured.loss,
    }


def memory_lacking(place: Place, device: torch.device) -> str:
    """Why a place cannot run for want of memory, as a sentence; empty where at least its state fits."""
    needed = state_bytes_needed(place) * len(place.modes)
    there = memory_bytes(device) // (1 if device.type == "cuda" else place.world_size)
    if needed < there:
        return ""
    return f"a process needs {needed / 1e9:.0f} GB for weights, gradients and moments; there are {there / 1e9:.0f} GB"
