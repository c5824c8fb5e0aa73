"""Every op × shape × dtype × pass × provider; an op added to the registry or a provider to the table adds its rows."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tilewright.benchmarks.kernels.contest import Outcome, contest
from tilewright.benchmarks.kernels.providers import PROVIDERS
from tilewright.benchmarks.kernels.replay import recorded_clock, replay
from tilewright.benchmarks.kernels.shapes import Case, cases
from tilewright.benchmarks.peaks import name_of
from tilewright.benchmarks.record import Session, device_of, dtypes_of

_CASES = pytest.StashKey[dict[str, Case]]()
# What came of the case that was measured last: its rows follow one another.
_OUTCOMES = pytest.StashKey[tuple[str, dict[str, Outcome]]]()
# (seconds of rounds of a case, the fewest rounds) by suite.
_LENGTHS = {"quick": (1.0, 6)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite, only = (metafunc.config.getoption(name) for name in ("suite", "only"))
    device, quick = device_of(metafunc.config.getoption("device")), suite == "quick"
    chosen = {
        str(case): case
        for case in cases(device, dtypes_of(device, quick=quick), quick=quick)
        if suite != "training" and (not only or case.spec.name in only)
    }
    metafunc.config.stash[_CASES] = chosen
    rows = [
        (name, provider, direction)
        for name, case in chosen.items()
        for provider in PROVIDERS
        for direction in _passes(case, device)
    ]
    metafunc.parametrize(("case", "provider", "direction"), rows, ids=["-".join(row) for row in rows])


def _passes(case: Case, device: torch.device) -> tuple[str, ...]:
    return ("forward", "backward", "both") if case.spec.differentiable(case.timed(device)) else ("forward",)


@pytest.mark.benchmark(timer=recorded_clock)
def test_kernel(
    case: str, provider: str, direction: str, session: Session, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    stash = request.config.stash
    measured = stash[_CASES][case]
    if stash.get(_OUTCOMES, ("", {}))[0] != case:
        seconds, least = _LENGTHS.get(request.config.getoption("suite"), (3.0, 11))
        stash[_OUTCOMES] = case, contest(measured, session.device, session.peaks, seconds=seconds, least=least)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    outcome = stash[_OUTCOMES][1][provider]
    row = {"op": measured.spec.name, "sample": measured.label, "dtype": name_of(measured.dtype), "provider": provider}
    reason = outcome.left_out or outcome.refused
    if reason and direction == "forward":
        (session.left_out if outcome.left_out else session.refused).append({**row, "reason": reason})
    if outcome.refused and provider.startswith("ours"):
        pytest.fail(outcome.refused, pytrace=False)
    if reason:
        pytest.skip(f"{provider}: {reason}")
    columns = {**row, "pass": direction, "device": str(session.device), **outcome.columns[direction]}
    replay(benchmark, outcome.rounds[direction], columns)
