"""Ratios of times and of memory, with the interval that the rounds leave open.

Within one run the providers of a case take turns, so that what slows the machine for a while slows both: the ratio is
taken round by round (`measure.paired_ratio`). Between two runs nothing is paired: every round of one is compared with
every round of the other (`measure.unpaired_ratio`).
"""

from __future__ import annotations

from typing import NamedTuple

from tilewright.benchmarks.measure import paired_ratio, unpaired_ratio
from tilewright.benchmarks.report.plots import Point
from tilewright.benchmarks.report.records import Absence, Record, Row

# Enough rounds for a 95% interval of their median.
_LEAST_ROUNDS = 6

METHOD = (
    "A provider is compared with ours, and torch.compile with ours compiled where that was measured. "
    "Within one run the providers of a case take turns: the ratio of two times is the median of the ratios of each "
    "round, its interval the 95% order-statistic interval of that median, which assumes no distribution. Between two "
    "runs it is the median of the ratios of every round of one to every round of the other, its interval that of Mann "
    "and Whitney's test (95%, which assumes that the two differ by a factor). Where rounds were not kept or are fewer "
    f"than {_LEAST_ROUNDS}, it is the ratio of the medians, and its interval goes from one median's lower end over the "
    "other's upper end to the reverse. What differs between two runs but not within one, no such interval can know. "
    "Peak memory is counted, not sampled, and has no interval. Green or red: the whole interval lies on that side."
)


def time_ratio(row: Row, other: Row, *, same_run: bool) -> Point:
    """`row`'s time over `other`'s."""
    if min(len(row.rounds), len(other.rounds)) >= _LEAST_ROUNDS and min(other.rounds) > 0:
        if not same_run:
            return Point(*unpaired_ratio(row.rounds, other.rounds))
        if len(row.rounds) == len(other.rounds):
            return Point(*paired_ratio(row.rounds, other.rounds))
    mine, theirs = row.seconds, other.seconds
    return Point(mine.value / theirs.value, mine.low / theirs.high, mine.high / theirs.low)


def memory_ratio(row: Row, other: Row) -> Point | None:
    """`row`'s peak memory over `other`'s; None where either is unknown."""
    mine, theirs = (one.figures.get("peak_memory_bytes") for one in (row, other))
    if mine is None or not theirs:
        return None
    return Point(mine / theirs, mine / theirs, mine / theirs)


class Change(NamedTuple):
    """A row beside the same row of an earlier record, and the ratios new ÷ earlier."""

    new: Row
    base: Row
    time: Point
    memory: Point | None

    def worse(self, above: float) -> list[str]:
        """What is worse by more than the share `above`, whatever in its interval is true."""
        verdicts = []
        for name, ratio in (("time", self.time), ("peak memory", self.memory)):
            if ratio is not None and ratio.low > 1 + above:
                verdicts.append(f"{name} is {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of it")
        return verdicts


def changes(new: Record, base: Record) -> list[Change]:
    """Every row that both records have, in the new record's order."""
    earlier = {(row.case, row.provider): row for row in base.rows}
    return [
        Change(row, before, time_ratio(row, before, same_run=False), memory_ratio(row, before))
        for row in new.rows
        if (before := earlier.get((row.case, row.provider))) is not None
    ]


def gone(new: Record, base: Record) -> list[Row]:
    """Rows that `base` has and `new` has not, though it neither refused them a time nor left them out."""
    there = {(row.case, row.provider) for row in new.rows}
    told = {absence[:4] for absence in (*new.refused, *new.left_out)}
    return [
        row
        for row in base.rows
        if (row.case, row.provider) not in there
        and (row.case.op, row.case.shape, row.case.dtype, row.provider) not in told
    ]


def lost(new: Record, base: Record) -> list[Absence]:
    """What `base` has a time for, and `new` was refused one for."""
    timed = {(row.case.op, row.case.shape, row.case.dtype, row.provider) for row in base.rows}
    return [absence for absence in new.refused if absence[:4] in timed]
