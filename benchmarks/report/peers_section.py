"""An audit beside the same audit of other libraries: where ours is better, equal or worse."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tilewright.benchmarks.report.plots import Dots, Point, lines_of_dots
from tilewright.benchmarks.report.tables import PLACE, Cell, folded, place, section, side_by_side, soft, table
from tilewright.trainer.record.plot import Plot

_VERDICTS = ("better", "equal", "worse")


def against_peers(rows: Sequence[Mapping[str, Any]]) -> str:
    """The section; nothing where there are no rows.

    Args:
        rows: each compares one figure (smaller is better) of one launch: ``op``, ``sample``, ``chip``, ``pass``,
            ``peer``, ``figure``, ``ours``, ``theirs`` and the ``verdict`` on ours.
    """
    if not rows:
        return ""
    counts = Counter((row["peer"], row["figure"], row["verdict"]) for row in rows)
    kinds = list(dict.fromkeys((row["peer"], row["figure"]) for row in rows))
    summary = table(
        ("peer", "figure", *_VERDICTS),
        ([*kind, *(_count(verdict, counts[*kind, verdict]) for verdict in _VERDICTS)] for kind in kinds),
    )
    worse = [row for row in rows if row["verdict"] == "worse"]
    return section(
        "Against other libraries",
        soft("The same audit of their kernels, at the same shapes and with their own launch rules."),
        summary,
        side_by_side(_plots(rows)),
        f"{soft('Where ours is worse:')}\n{_listed(worse)}" if worse else "",
        folded(f"All {len(rows):,} rows", _listed(rows)),
    )


def _count(verdict: str, number: int) -> Cell:
    return Cell(str(number), f"number {verdict}" if number and verdict != "equal" else "number")


def _listed(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(
        (*PLACE, "peer", "figure", "ours", "theirs", "verdict"),
        (
            [
                *place(row),
                row["peer"],
                row["figure"],
                Cell(_value(row["ours"])),
                Cell(_value(row["theirs"])),
                Cell(row["verdict"], row["verdict"]),
            ]
            for row in rows
        ),
    )


def _plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """Of every figure that has ratios, one line for each op and pass."""
    for figure in dict.fromkeys(row["figure"] for row in rows):
        gathered: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            ours, theirs = row["ours"], row["theirs"]
            if row["figure"] == figure and _is_positive(ours) and _is_positive(theirs):
                line = gathered.setdefault(f"{row['op']} {row['pass']}", {})
                line.setdefault(row["peer"], []).append(ours / theirs)
        lines = [
            Dots(label, {peer: Point(statistics.median(all_), min(all_), max(all_)) for peer, all_ in of.items()})
            for label, of in gathered.items()
        ]
        if lines:
            caption = "Left of the line is in our favour. Dot: the median over shapes and chips; line: all of them."
            yield lines_of_dots(f"{figure}, ours ÷ theirs", caption, lines, "ours ÷ theirs", log=True, at=1.0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _value(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
