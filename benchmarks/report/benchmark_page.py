"""The page of a benchmark record: every provider over every shape, ratios, and an earlier record beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.benchmarks.report.plots import Curve, Dots, Point, lines_of_dots, over_shapes
from tilewright.benchmarks.report.ratios import METHOD, Change, changes, memory_ratio, time_ratio
from tilewright.benchmarks.report.records import OURS, Case, Record, Row, cases_of, code_of, origin, rival_of
from tilewright.benchmarks.report.tables import (
    Cell,
    amount,
    folded,
    ratio_cell,
    seconds,
    section,
    side_by_side,
    soft,
    table,
    warning,
)
from tilewright.trainer.record import page
from tilewright.trainer.record.plot import Plot
from tilewright.trainer.record.quantities import percent

_Cases = Mapping[Case, Mapping[str, Row]]
_RatioOf = Callable[[Row, Row], Point | None]


class _Column(NamedTuple):
    """A figure of a row that has a column wherever one row has it."""

    key: str
    heading: str
    shown: Callable[[float], str]


_COLUMNS = (
    _Column("bytes_per_second", "GB/s", lambda value: f"{value / 1e9:,.1f}"),
    _Column("flops_per_second", "TFLOP/s", lambda value: f"{value / 1e12:,.3g}"),
    _Column("share_of_measured_peak", "of measured peak", percent),
    _Column("tokens_per_second", "tokens/s", lambda value: f"{value:,.0f}"),
    _Column("mfu", "MFU", percent),
    _Column("peak_memory_bytes", "peak memory", amount),
    _Column("algorithm_memory_bytes", "memory needed", amount),
    _Column("compile_seconds", "compile", seconds),
)
# Of more lines a plot would be longer than its table is.
_MOST_LINES = 40
# Letters under an axis; what is longer stands beside it.
_LONGEST_TICK = 36


def write(path: Path, new: Record, base: Record | None = None, audit: Mapping[str, Any] | None = None) -> None:
    """Write the report of `new`, beside the earlier record `base` and what `audit` predicts where they are given.

    Raises:
        TrainingError: it cannot be written there.
    """
    cases = cases_of(new)
    # A provider has its colour on all of the page.
    colors = {name: number for number, name in enumerate(dict.fromkeys(row.provider for row in new.rows))}
    sections = [
        _header(new, base),
        page.cards(_headlines(new, cases)),
        _against_base(new, base) if base is not None else "",
        _ours_against_others(cases, colors),
        *_ops(cases, colors),
        _not_measured(new),
        _predicted_and_measured(new, audit),
        section("How the ratios are taken", soft(METHOD)),
        section("What the figures mean", table(("figure", "definition"), list(new.definitions.items()))),
        page.environment(new.environment),
    ]
    page.write(path, page.document(f"Benchmarks: {new.device}", sections))


def difference_of_devices(new: Record, base: Record) -> str | None:
    """Why the two records cannot be compared, or None where they come from the same kind of device."""
    if new.device == base.device:
        return None
    return (
        f"Different devices: {new.path.name} was measured on {new.device}, {base.path.name} on {base.device}. "
        "Figures of different devices are not comparable: the ratios between the two say nothing of the code."
    )


def _header(new: Record, base: Record | None) -> str:
    compared = soft(f"Compared with {base.path.name}: {code_of(base.environment)}") if base else ""
    different = difference_of_devices(new, base) if base else None
    note = warning(different) if different else ""
    return f"<header>\n<h1>Benchmarks</h1>\n{soft(origin(new.environment))}\n{compared}\n{note}\n</header>"


def _headlines(new: Record, cases: _Cases) -> Iterator[tuple[str, str, str]]:
    names = list(dict.fromkeys(row.provider for row in new.rows))
    yield "times measured", f"{len(new.rows):,}", f"of {len(cases):,} cases"
    yield "providers", str(len(names)), ", ".join(names)
    for label, ratio_of in (("another is faster", _time_in_run), ("another needs less memory", memory_ratio)):
        found = [list(_ratios(rows, ratio_of).values()) for rows in cases.values()]
        compared = [ratios for ratios in found if ratios]
        if compared:
            lost = sum(any(ratio.low > 1 for ratio in ratios) for ratios in compared)
            yield label, f"{lost} of {len(compared)}", "cases, by the whole interval"
    if new.refused:
        yield "refused a time", f"{len(new.refused):,}", "they failed, or computed something else"


def _time_in_run(row: Row, other: Row) -> Point | None:
    return time_ratio(row, other, same_run=True)


def _ratios(rows: Mapping[str, Row], ratio_of: _RatioOf) -> dict[str, Point]:
    """Of one case, ours over each other provider."""
    pairs = ((rival_of(row, rows), row) for row in rows.values())
    ratios = {other.provider: ratio_of(ours, other) for ours, other in pairs if ours is not None}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _ours_against_others(cases: _Cases, colors: Mapping[str, int]) -> str:
    drawn = [
        plot
        for title, ratio_of in (("Time, ours ÷ other", _time_in_run), ("Peak memory, ours ÷ other", memory_ratio))
        if (plot := _ratio_plot(title, cases, ratio_of, colors)) is not None
    ]
    return section("Ours against others", side_by_side(drawn))


def _ratio_plot(title: str, cases: _Cases, ratio_of: _RatioOf, colors: Mapping[str, int]) -> Plot | None:
    """One line for each op and pass, one dot for each other provider: the middle and the range over the shapes."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for case, rows in cases.items():
        for provider, ratio in _ratios(rows, ratio_of).items():
            line = gathered.setdefault(f"{case.op} {case.direction}".strip(), {})
            line.setdefault(provider, []).append(ratio.value)
    if not gathered:
        return None
    lines = [
        Dots(label, {who: Point(statistics.median(all_), min(all_), max(all_)) for who, all_ in of.items()})
        for label, of in gathered.items()
    ]
    caption = "Left of the line is in our favour. Dot: the median over shapes; line: from the least to the greatest."
    return lines_of_dots(title, caption, lines, "ours ÷ other", log=True, at=1.0, colors=colors)


def _ops(cases: _Cases, colors: Mapping[str, int]) -> Iterator[str]:
    for op in dict.fromkeys(case.op for case in cases):
        of_op = {case: rows for case, rows in cases.items() if case.op == op}
        count = sum(map(len, of_op.values()))
        yield section(op, side_by_side(_time_plots(op, of_op, colors)), folded(f"All {count} rows", _table(of_op)))


def _time_plots(op: str, cases: _Cases, colors: Mapping[str, int]) -> Iterator[Plot]:
    several_dtypes = len({case.dtype for case in cases}) > 1
    for direction, dtype in dict.fromkeys((case.direction, case.dtype) for case in cases):
        points: dict[str, dict[str, Point]] = {}
        for case, rows in cases.items():
            for provider, row in rows.items():
                if (case.direction, case.dtype) == (direction, dtype):
                    points.setdefault(provider, {})[case.shape or op] = row.seconds
        scale, unit = _unit(max(point.value for of in points.values() for point in of.values()))
        curves = [
            Curve(name, {shape: Point(*(scale * end for end in point)) for shape, point in of.items()}, colors[name])
            for name, of in points.items()
        ]
        title = " ".join(part for part in (op, direction, dtype if several_dtypes else "") if part)
        caption = "Median time; bars: its 95% interval."
        shapes = dict.fromkeys(shape for curve in curves for shape in curve.points)
        if max(map(len, shapes)) <= _LONGEST_TICK:
            yield over_shapes(title, caption, curves, unit)
        else:
            lines = [Dots(s, {curve.name: curve.points[s] for curve in curves if s in curve.points}) for s in shapes]
            yield lines_of_dots(title, caption, lines, unit, log=True, colors=colors)


def _unit(longest: float) -> tuple[float, str]:
    """What seconds are multiplied by, and the unit that this gives."""
    return (1.0, "s") if longest >= 1 else (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")


def _table(cases: _Cases) -> str:
    rows = [row for of in cases.values() for row in of.values()]
    columns = [column for column in _COLUMNS if any(column.key in row.figures for row in rows)]
    header = ["shape", "dtype", "pass", "provider", "runs", "median", "95% interval"]
    header += [column.heading for column in columns] + ["time: ours ÷ it", "memory: ours ÷ it", "note"]
    return table(header, (_table_row(row, rival_of(row, of), columns) for of in cases.values() for row in of.values()))


def _table_row(row: Row, rival: Row | None, columns: Sequence[_Column]) -> list[str | Cell]:
    case, time = row.case, row.seconds
    return [
        case.shape,
        case.dtype,
        case.direction,
        row.provider,
        row.implementation,
        Cell(seconds(time.value)),
        Cell(f"{seconds(time.low)} to {seconds(time.high)}"),
        *(Cell(column.shown(row.figures[column.key]) if column.key in row.figures else "n/a") for column in columns),
        ratio_cell(_time_in_run(rival, row) if rival else None),
        ratio_cell(memory_ratio(rival, row) if rival else None),
        row.note,
    ]


def _against_base(new: Record, base: Record) -> str:
    found = changes(new, base)
    if not found:
        return section("New ÷ base", warning(f"{new.path.name} and {base.path.name} have no row in common."))
    ordered = sorted(found, key=lambda change: -change.time.low)
    changed = [change for change in ordered if any(map(_excludes_one, (change.time, change.memory)))]
    header = ["op", "shape", "dtype", "pass", "provider", "new", "base", "time: new ÷ base", "memory: new ÷ base"]
    here = {(row.case, row.provider) for row in new.rows}
    gone = [f"{row.case}, {row.provider}" for row in base.rows if (row.case, row.provider) not in here]
    return section(
        "New ÷ base",
        soft(
            f"{len(changed):,} of {len(found):,} rows differ: all of the interval of their time lies on one side of 1, "
            "or their memory differs. Right of the line, and red, is worse than the base."
        ),
        side_by_side(_change_plots(found)),
        folded(f"The {len(changed):,} rows that differ, the slowest first", table(header, map(_change_row, changed))),
        folded(f"All {len(found):,} rows", table(header, map(_change_row, ordered))),
        folded(f"{len(gone):,} rows of the base that the new record lacks", soft("; ".join(gone)) if gone else ""),
    )


def _excludes_one(ratio: Point | None) -> bool:
    return ratio is not None and (ratio.low > 1 or ratio.high < 1)


def _change_row(change: Change) -> list[str | Cell]:
    return [
        *change.new.case,
        change.new.provider,
        Cell(seconds(change.new.seconds.value)),
        Cell(seconds(change.base.seconds.value)),
        ratio_cell(change.time),
        ratio_cell(change.memory),
    ]


def _change_plots(found: Sequence[Change]) -> Iterator[Plot]:
    ours = [change for change in found if change.new.provider == OURS]
    times: list[tuple[str, Point | None]] = [(str(change.new.case), change.time) for change in ours]
    memories = [(str(change.new.case), change.memory) for change in ours]
    # What memory is counted does not waver: a plot of it is about what differs.
    memories = [(case, ratio) for case, ratio in memories if ratio is not None and ratio.value != 1]
    for name, ratios in (("Time", times), ("Peak memory", memories)):
        lines = [Dots(case, {OURS: ratio}) for case, ratio in ratios if ratio is not None]
        lines.sort(key=lambda line: -line.points[OURS].low)
        if lines:
            caption = f"The worst {_MOST_LINES} of {len(lines)}." if len(lines) > _MOST_LINES else ""
            title = f"{name} of ours, new ÷ base"
            yield lines_of_dots(title, caption, lines[:_MOST_LINES], "new ÷ base", log=True, at=1.0)


def _not_measured(new: Record) -> str:
    ops: dict[tuple[str, str], dict[str, None]] = {}
    for absence in new.left_out:
        ops.setdefault((absence.provider, absence.reason), {})[absence.op] = None
    return section(
        "Not measured",
        table(("refused", "shape", "dtype", "provider", "reason"), new.refused),
        table(("left out", "reason", "ops"), ((*who_and_why, ", ".join(of)) for who_and_why, of in ops.items())),
    )


def _predicted_and_measured(new: Record, audit: Mapping[str, Any] | None) -> str:
    floors = _floors(new, audit)
    rows = [_predicted_row(row, floors) for row in new.rows if row.is_ours]
    header = ["ours", "memory, predicted", "measured", "measured ÷ predicted"]
    header += ["time, predicted", "measured", "measured ÷ predicted"]
    peaks = (
        "the datasheet's peaks of this chip, which the audit predicts for bfloat16"
        if floors
        else "the peaks of memory and matrix products that the same run measured on this device"
    )
    return section(
        "What was predicted, what measured",
        soft(
            "Predicted memory: what the algorithm must hold, from the shapes alone. Predicted time: the roofline floor "
            f"at {peaks}. All else on this page was measured."
        ),
        folded(f"All {len(rows)} rows", table(header, rows)),
    )


def _predicted_row(row: Row, floors: Mapping[Case, float]) -> list[str | Cell]:
    needed, peak = (row.figures.get(key) for key in ("algorithm_memory_bytes", "peak_memory_bytes"))
    share = row.figures.get("share_of_measured_peak")
    measured = row.seconds.value
    floor = floors.get(row.case) if floors else measured * share if share else None
    return [
        f"{row.case}, {row.provider}",
        Cell(amount(needed)),
        Cell(amount(peak)),
        Cell(f"{peak / needed:.2f}" if peak is not None and needed else "n/a"),
        Cell(seconds(floor)),
        Cell(seconds(measured)),
        Cell(f"{measured / floor:.2f}" if floor else "n/a"),
    ]


def _floors(new: Record, audit: Mapping[str, Any] | None) -> dict[Case, float]:
    """The audit's floors in seconds, for the chip that the record was measured on."""
    if audit is None or new.chip is None:
        return {}
    return {
        Case(str(row["op"]), str(row["sample"]), dtype, str(row["pass"])): 1e-6 * float(row["predicted_microseconds"])
        for row in audit.get("floors", [])
        if row.get("chip") == new.chip and row.get("predicted_microseconds") is not None
        for dtype in ("bfloat16", "torch.bfloat16")
    }
