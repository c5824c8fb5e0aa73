"""Hand pytest-benchmark rounds that were timed elsewhere.

Its own loop times one function until it is done and then the next; here the providers of a case take turns, so that all
are timed before the first test of the case reports. Its clock is replaced by one that repeats what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

_marks: Iterator[float] = iter(())


def recorded_clock() -> float:
    """For ``@pytest.mark.benchmark(timer=…)``: from one call to the next, the next recorded round goes by."""
    return next(_marks)


def replay(benchmark: Any, seconds: Sequence[float], columns: dict[str, Any]) -> None:
    """Let the fixture `benchmark` report `seconds` as its rounds, and `columns` as its extra_info."""
    global _marks
    # A round is the time from one mark to the next; from 0, no digit of it is lost in the difference.
    _marks = itertools.chain.from_iterable((0.0, taken) for taken in seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
    benchmark.extra_info.update(columns)
