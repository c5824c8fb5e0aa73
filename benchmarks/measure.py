"""How a time is taken, and what is said of many: rounds in which the rivals alternate, the median and its interval.

One after another, whole series would each meet a machine of their own: its clock, its temperature and its other users
change over seconds. So each round measures every rival once, in an order drawn anew, and rivals are compared within
rounds. Warm-up rounds come first and are not kept.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

# One measurement: seconds by what was timed, such as {"forward": …, "backward": …}.
Measurement = Callable[[], Mapping[str, float]]
Rounds = dict[str, list[float]]


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in each round, by its name; on a GPU until it has finished. Warm them up before."""
    timed = {name: _whole(call) for name, call in calls.items()}
    kept = in_rounds(timed, least=rounds, most=rounds, warm_up=0)
    return {name: passes["call"] for name, passes in kept.items()}


def in_rounds(
    measurements: Mapping[str, Measurement],
    *,
    seconds: float = 3.0,
    least: int = 11,
    most: int = 101,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Rounds]:
    """Measure every rival in each round; all get the same number of rounds, and what one round took belongs together.

    Args:
        measurements: by the rival's name.
        seconds: begin no further round once so much time has gone by, but for `least`.
        least, most: how many rounds are kept.
        warm_up: rounds that come first and are not kept.
        clock: seconds, for `seconds`.

    Returns:
        By rival and by what was timed, the seconds of each round.
    """
    kept: dict[str, Rounds] = {name: {} for name in measurements}
    order, draw = list(measurements), random.Random(0)
    for _ in range(warm_up):
        for name in order:
            measurements[name]()
    start = clock()
    for number in range(most):
        if number >= least and clock() - start >= seconds:
            break
        draw.shuffle(order)
        for name in order:
            for what, taken in measurements[name]().items():
                kept[name].setdefault(what, []).append(taken)
    return kept


class Interval(NamedTuple):
    """A median, and what it lies between with the confidence that was asked for."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of `values`, and two of them between which the true median lies with at least `confidence`.

    Of n independent values, the number below the true median is binomial (n, 1/2), whatever their distribution: the
    k-th smallest and the k-th largest enclose it unless fewer than k lie on one side (David and Nagaraja, Order
    Statistics, 7.1).

    Raises:
        ValueError: there are too few values for any interval; for 95% there must be six.
    """
    count = len(values)
    k, outside = 0, 2 / 2**count  # the chance that all lie on one side
    while outside <= 1 - confidence and k < count // 2:
        k += 1
        outside += 2 * math.comb(count, k) / 2**count
    if k == 0:
        raise ValueError(f"median_interval: there are {count} values, too few for an interval of {confidence:.0%}")
    ordered = sorted(values)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[count - k])


# Of which the smallest and the largest enclose the true median often enough to be worth saying: 15 times of 16.
LEAST_ROUNDS = 5


def confidence_of(rounds: int) -> float:
    """0.95, or what an interval over five rounds has."""
    return 0.95 if rounds > LEAST_ROUNDS else 1 - 2 / 2**LEAST_ROUNDS


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95) -> Interval:
    """How many times longer one rival takes than another: the median of the ratios within each round."""
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=True)], confidence)


def unpaired_ratio(numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95) -> Interval:
    """How many times longer one series of times is than another that was taken apart from it.

    The median of all m · n ratios, and two of them between which the true factor lies with at least `confidence` if the
    two differ by a factor and nothing else: the k-th smallest and the k-th largest, where the number of ratios on one
    side is that of Mann and Whitney's U (Hodges and Lehmann's estimate; Hollander, Wolfe and Chicken, Nonparametric
    Statistical Methods, 4.2 and 4.3, on logarithms).

    Raises:
        ValueError: there are too few values for any interval; for 95% there must be four and four.
    """
    ways = _mann_whitney(len(numerator), len(denominator))
    k, outside = 0, 2 * ways[0] / sum(ways)
    while outside <= 1 - confidence and k < len(ways) // 2:
        k += 1
        outside += 2 * ways[k] / sum(ways)
    if k == 0:
        counts = f"{len(numerator)} and {len(denominator)}"
        raise ValueError(f"unpaired_ratio: there are {counts} values, too few for an interval of {confidence:.0%}")
    ordered = sorted(a / b for a in numerator for b in denominator)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[-k])


def _mann_whitney(m: int, n: int) -> list[int]:
    """In how many of the orders of m and n values U is 0, 1, …, m · n: the coefficients of the Gaussian binomial."""
    ways = [1] + [0] * (m * n)
    for i in range(1, n + 1):
        for u in range(m * n, m + i - 1, -1):  # · (1 − q^(m + i))
            ways[u] -= ways[u - m - i]
        for u in range(i, m * n + 1):  # ÷ (1 − q^i)
            ways[u] += ways[u - i]
    return ways


class Step(Protocol):
    """A forward pass, and the backward pass of what it left; `backward` is None where there is no gradient."""

    def forward(self) -> object: ...
    @property
    def backward(self) -> Callable[[], object] | None: ...


def of_passes(steps: Sequence[Step], device: torch.device, *, capture: bool = True) -> tuple[Measurement, str]:
    """What measures one step's forward, backward and both, on average over `steps`, and in words how.

    The steps do the same on buffers of their own. Each pass goes through all of them before the next begins, so that
    where together they exceed the cache, each finds it cold. On a GPU a pass over all of them is one CUDA graph: no
    time between launches is counted; unless `capture` is False, for a graph keeps the memory that its calls take.
    """
    runs = _runs(steps)
    if device.type != "cuda":
        return _timed(runs, len(steps), _seconds_on_cpu), "perf_counter"
    if not capture:
        return _timed(runs, len(steps), _seconds_on_cuda), "CUDA events, host included; too large to be captured"
    try:
        replays = _captured(runs)
    except RuntimeError as error:  # something in it waits for the device, which a graph cannot hold
        reason = str(error).splitlines()[0]
        return _timed(runs, len(steps), _seconds_on_cuda), f"CUDA events, host included; not captured: {reason}"
    return _timed(replays, len(steps), _seconds_on_cuda), "CUDA graph between CUDA events"


def _runs(steps: Sequence[Step]) -> dict[str, Callable[[], object]]:
    """By pass, a call that makes it for every step."""

    def forward() -> None:
        for step in steps:
            step.forward()

    def backward() -> None:
        for step in steps:
            if step.backward is not None:
                step.backward()

    def both() -> None:
        for step in steps:
            step.forward()
            if step.backward is not None:
                step.backward()

    if steps[0].backward is None:
        return {"forward": forward}
    return {"forward": forward, "backward": backward, "both": both}


def _timed(
    runs: Mapping[str, Callable[[], object]], steps: int, seconds: Callable[[Callable[[], object]], float]
) -> Measurement:
    return lambda: {name: seconds(run) / steps for name, run in runs.items()}


def _whole(call: Callable[[], object]) -> Measurement:
    def wait() -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()

    def run() -> None:
        call()
        wait()

    def measure() -> dict[str, float]:
        wait()
        return {"call": _seconds_on_cpu(run)}

    return measure


def _seconds_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _captured(runs: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Each call as a CUDA graph. They share memory, for the backward pass reads what the forward pass left."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs.values():
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graphs: dict[str, Any] = {}
    pool = torch.cuda.graph_pool_handle()
    for name, run in runs.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], pool=pool, stream=side):
            run()
    return {name: graph.replay for name, graph in graphs.items()}
