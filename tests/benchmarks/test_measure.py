"""Rivals take turns, intervals hold what they promise, and a pass is timed over all its buffers before the next."""

import itertools
import random
import statistics
from collections.abc import Callable

import pytest
import torch

from tilewright.benchmarks import measure
from tilewright.benchmarks.measure import (
    confidence_of,
    in_rounds,
    interleaved,
    median_interval,
    of_passes,
    paired_ratio,
    unpaired_ratio,
)


def test_every_round_measures_every_rival_once_and_warm_up_is_not_kept() -> None:
    calls: list[str] = []

    def rival(name: str) -> measure.Measurement:
        def taken() -> dict[str, float]:
            calls.append(name)
            return {"pass": float(len(calls))}

        return taken

    kept = in_rounds({name: rival(name) for name in "abc"}, least=20, most=20, warm_up=2)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) == 22
    assert len({tuple(one) for one in rounds}) == 6, "the order is drawn anew"
    # The first two rounds were warm-up: six calls.
    assert min(kept["a"]["pass"]) > 6
    assert [len(kept[name]["pass"]) for name in "abc"] == [20, 20, 20]


def test_rounds_end_with_the_time_but_not_before_the_least() -> None:
    now = 0.0

    def slow() -> dict[str, float]:
        nonlocal now
        now += 1.0
        return {"pass": 1.0}

    assert len(in_rounds({"slow": slow}, seconds=4.0, least=2, warm_up=0, clock=lambda: now)["slow"]["pass"]) == 4
    assert len(in_rounds({"slow": slow}, seconds=4.0, least=9, warm_up=0, clock=lambda: now)["slow"]["pass"]) == 9


def test_interleaved_calls_each_as_often_as_was_asked() -> None:
    made: list[int] = []
    seconds = interleaved({"one": lambda: made.append(1), "two": lambda: made.append(2)}, 7)
    assert sorted(made) == [1] * 7 + [2] * 7
    assert all(len(times) == 7 and min(times) > 0 for times in seconds.values())


@pytest.mark.parametrize(
    ("count", "rank"),
    # k for which the k-th smallest and largest enclose the median with 95%: tables of the sign test.
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (20, 6), (25, 8), (100, 40)],
)
def test_the_interval_is_that_of_the_sign_test(count: int, rank: int) -> None:
    values = random.Random(0).sample(range(1, count + 1), count)
    assert median_interval(values) == (statistics.median(values), rank, count + 1 - rank)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    held = sum(
        low <= 1.0 <= high
        for _, low, high in (median_interval([draw.lognormvariate(0.0, 1.0) for _ in range(15)]) for _ in range(2000))
    )
    assert 0.95 <= held / 2000 < 0.98


def test_five_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="5 values, too few for an interval of 95%"):
        median_interval([1.0] * 5)


def test_a_drift_that_both_share_does_not_widen_their_ratio() -> None:
    drift = [1.5**number for number in range(12)]
    assert paired_ratio([3 * d for d in drift], [2 * d for d in drift]) == (1.5, 1.5, 1.5)


class _Noted:
    def __init__(self, notes: list[str], number: int, backward: bool = True) -> None:
        self._notes, self._number, self._has_backward = notes, number, backward

    def forward(self) -> None:
        self._notes.append(f"forward {self._number}")

    @property
    def backward(self) -> Callable[[], None] | None:
        return (lambda: self._notes.append(f"backward {self._number}")) if self._has_backward else None


def test_a_pass_goes_through_all_buffers_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    def twelve_seconds(run: Callable[[], object]) -> float:
        run()
        return 12.0

    monkeypatch.setattr(measure, "_seconds_on_cpu", twelve_seconds)
    taken, _ = of_passes([_Noted(notes, 0), _Noted(notes, 1)], torch.device("cpu"))
    assert taken() == {"forward": 6.0, "backward": 6.0, "both": 6.0}
    assert notes[:4] == ["forward 0", "forward 1", "backward 0", "backward 1"]
    assert notes[4:] == ["forward 0", "backward 0", "forward 1", "backward 1"]


def test_without_a_gradient_there_is_a_forward_pass_alone() -> None:
    taken, _ = of_passes([_Noted([], 0, backward=False)], torch.device("cpu"))
    assert list(taken()) == ["forward"]


def test_on_a_gpu_the_passes_are_replayed_and_what_cannot_be_captured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, notes = torch.device("cuda", 0), []

    def eight_seconds(run: Callable[[], object]) -> float:
        run()
        return 8.0

    def replays(runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        return {name: lambda name=name: notes.append(f"replay {name}") for name in runs}

    def refusal(runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(measure, "_seconds_on_cuda", eight_seconds)
    monkeypatch.setattr(measure, "_captured", replays)
    taken, how = of_passes([_Noted(notes, 0), _Noted(notes, 1)], cuda)
    assert taken() == {"forward": 4.0, "backward": 4.0, "both": 4.0}
    assert notes == ["replay forward", "replay backward", "replay both"]
    assert how == "CUDA graph between CUDA events"
    monkeypatch.setattr(measure, "_captured", refusal)
    taken, how = of_passes([_Noted(notes, 0)], cuda)
    assert how.endswith("not captured: operation not permitted when stream is capturing")
    taken()
    assert notes[3:] == ["forward 0", "backward 0", "forward 0", "backward 0"]
    assert "too large" in of_passes([_Noted(notes, 0)], cuda, capture=False)[1]


def test_the_interval_of_two_runs_holds_their_factor_as_often_as_it_promises() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        base = [rng.lognormvariate(0.0, 0.3) for _ in range(6)]
        ratio = unpaired_ratio([2.0 * rng.lognormvariate(0.0, 0.3) for _ in range(7)], base)
        held += ratio.low <= 2.0 <= ratio.high
    assert 0.94 <= held / 2000 <= 0.985
    with pytest.raises(ValueError, match="there are 3 and 3 values, too few for an interval of 95%"):
        unpaired_ratio([1.0] * 3, [1.0] * 3)


def test_the_ways_of_mann_and_whitney_are_those_of_all_orders() -> None:
    counted = [0] * 13
    for chosen in itertools.combinations(range(7), 3):
        counted[sum(place - number for number, place in enumerate(chosen))] += 1
    assert measure._mann_whitney(3, 4) == measure._mann_whitney(4, 3) == counted


def test_five_rounds_have_an_interval_and_say_how_sure_it_is() -> None:
    assert median_interval([5.0, 1.0, 3.0, 2.0, 4.0], confidence_of(5)) == (3.0, 1.0, 5.0)
    assert (confidence_of(5), confidence_of(6)) == (0.9375, 0.95)
