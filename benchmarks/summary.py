"""A record on the terminal: ours beside every other provider, who is missing, and what was refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from tilewright.benchmarks.measure import paired_ratio

_OURS = "ours"
_Rows = Mapping[str, Mapping[str, Any]]


def summary(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """What to print of a record that ``tilewright benchmark run`` wrote."""
    by_case: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for entry in record["benchmarks"]:
        info = entry["extra_info"]
        key = tuple(str(info.get(column, "")) for column in ("op", "sample", "dtype", "pass"))
        by_case.setdefault(key, {})[str(info.get("provider", _OURS))] = entry
    others = list(dict.fromkeys(name for rows in by_case.values() for name in rows if name != _OURS))
    table = Table("op, shape, dtype", "pass", "ours", "of peak", "memory", *others, box=box.SIMPLE_HEAD)
    before = ""
    for (op, sample, dtype, direction), rows in by_case.items():
        case = f"{op} {sample} {dtype}"
        table.add_row(case if case != before else "", direction, *_ours(rows), *(_ratio(rows, name) for name in others))
        before = case
    yield table
    yield "Under a provider: ours ÷ its time, the median of the rounds; (…) where the 95% interval holds 1."
    ours = record.get("tilewright_record", {})
    yield from (f"refused: {_who(row)}" for row in ours.get("refused", []))
    yield from _left_out(ours.get("left_out", []))


def _left_out(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A line for each provider: why it is not there, and for which ops it has no counterpart."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        missing = dict.fromkeys(row["op"] for row in own if row["reason"].endswith(f"has no {row['op']}"))
        reasons = dict.fromkeys(row["reason"] for row in own if row["op"] not in missing)
        no_counterpart = [f"no counterpart of {', '.join(missing)}"] if missing else []
        yield f"left out: {provider}: {'; '.join([*reasons, *no_counterpart])}"


def _ours(rows: _Rows) -> tuple[str, str, str]:
    if _OURS not in rows:
        return "-", "-", "-"
    info = rows[_OURS]["extra_info"]
    share, memory = info.get("share_of_measured_peak"), info.get("peak_memory_bytes")
    taken = time_text(info["median_seconds"])
    return taken, "-" if share is None else f"{share:.0%}", "-" if memory is None else memory_text(memory)


def _ratio(rows: _Rows, other: str) -> str:
    if _OURS not in rows or other not in rows:
        return "-"
    ratio = paired_ratio(rows[_OURS]["stats"]["data"], rows[other]["stats"]["data"])
    return f"({ratio.median:.2f})" if ratio.low <= 1 <= ratio.high else f"{ratio.median:.2f}"


def time_text(seconds: float) -> str:
    """As in "12.3 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def memory_text(byte_count: float) -> str:
    """As in "12.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if byte_count >= scale:
            return f"{byte_count / scale:.3g} {unit}"
    return f"{byte_count / 1e3:.3g} kB"


def _who(row: Mapping[str, str]) -> str:
    return f"{row['op']} {row['sample']} {row['dtype']}, {row['provider']}: {row['reason']}"
