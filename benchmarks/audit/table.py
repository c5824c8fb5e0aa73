"""The audit in the terminal: what was compiled, what is issued, and the bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.table import Table

from tilewright.benchmarks.audit.bars import Verdict

Audit = dict[str, Any]
Row = dict[str, Any]


def compiled_table(audit: Audit) -> Table:
    """A line for each op, pass, kernel and chip; of its shapes the worst figure."""
    table = Table("op", "pass", "kernel", "chip", title="Compiled: the worst over the shapes", title_justify="left")
    for name in ("kernels", "registers", "spills", "stack", "shared KiB", "blocks/SM", "occupancy", "128-bit"):
        table.add_column(name, justify="right")
    table.add_column("tensor-core instructions", justify="right")
    table.add_column("compile s", justify="right")
    for (op, part, name, chip), kernels in _grouped(audit).items():
        table.add_row(
            op,
            part,
            name.partition(".")[2] if name.startswith(f"{op}.") else name,
            f"sm_{chip}",
            str(len(kernels)),
            str(_most(kernels, lambda k: k["registers"])),
            str(_most(kernels, lambda k: k["spill_loads"] + k["spill_stores"])),
            str(_most(kernels, lambda k: k["stack_bytes"])),
            f"{_most(kernels, lambda k: k['shared_bytes']) / 1024:.0f}",
            str(min(k["blocks_per_processor"] for k in kernels)),
            f"{min(k['occupancy'] for k in kernels):.0%}",
            _least_wide(kernels),
            _tensor_cores(kernels),
            f"{sum(k['compile_seconds'] for k in kernels):.1f}",
        )
    return table


def _grouped(audit: Audit) -> dict[tuple[str, str, str, int], list[Row]]:
    """The distinct kernels of each line."""
    groups: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for row in audit["launches"]:
        kernel = audit["kernels"][row["kernel"]]
        groups.setdefault((row["op"], row["pass"], kernel["kernel"], row["chip"]), {})[row["kernel"]] = kernel
    return {place: list(kernels.values()) for place, kernels in sorted(groups.items())}


def _most(kernels: Iterable[Row], figure: Callable[[Row], int]) -> int:
    return max(map(figure, kernels))


def _tensor_cores(kernels: list[Row]) -> str:
    """The fewest instructions of each kind."""
    kinds = sorted({kind for k in kernels for kind in k["tensor_cores"]})
    return ", ".join(f"{min(k['tensor_cores'].get(kind, 0) for k in kernels)} {kind}" for kind in kinds)


def _least_wide(kernels: Iterable[Row]) -> str:
    shares = [k["wide_accesses"] / k["global_accesses"] for k in kernels if k["global_accesses"]]
    return f"{min(shares):.0%}" if shares else "—"


def traffic_table(audit: Audit) -> Table:
    """A line for each op, pass and chip: of its shapes the worst ratios, and the least and the longest floor."""
    table = Table("op", "pass", "chip", title="Issued: the worst over the shapes", title_justify="left")
    table.add_column("bytes ÷ compulsory", justify="right")
    table.add_column("FLOPs ÷ required", justify="right")
    table.add_column("roofline floor, µs, predicted", justify="right")
    table.add_column("note", overflow="fold")
    floors: dict[tuple[str, str, int], list[float]] = {}
    for row in audit["floors"]:
        floors.setdefault((row["op"], row["pass"], row["chip"]), []).append(row["predicted_microseconds"])
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in audit["traffic"]:
        groups.setdefault((row["op"], row["pass"], row["chip"]), []).append(row)
    for place, rows in sorted(groups.items()):
        times = floors.get(place, [])
        table.add_row(
            place[0],
            place[1],
            f"sm_{place[2]}",
            _largest(rows, "byte_ratio"),
            _largest(rows, "flop_ratio"),
            f"{min(times):,.1f} to {max(times):,.1f}" if times else "—",
            next((row["note"] for row in rows if row["note"]), ""),
        )
    return table


def _largest(rows: Iterable[Row], figure: str) -> str:
    figures = [row[figure] for row in rows if row[figure] is not None]
    return f"{max(figures):.3f}" if figures else "—"


def bars_table(verdicts: Iterable[Verdict]) -> Table:
    """Each bar that is about what was audited, whether it is met, and its worst row."""
    table = Table("bar", "at most", "worst", "", "rows", "the worst row", title="Bars", title_justify="left")
    for verdict in verdicts:
        if verdict.met is None:
            continue
        worst = verdict.worst
        table.add_row(
            verdict.bar.name,
            _figure(verdict.bar.bound),
            _figure(worst.value) if worst else "—",
            "met" if verdict.met else "[bold red]NOT MET[/]",
            f"{verdict.rows:,}",
            worst.row if worst else "",
        )
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"


def error_lines(errors: Iterable[Row]) -> Iterator[str]:
    """A line for each launch or sample that failed."""
    for error in errors:
        what = error.get("kernel") or error["op"]
        part = f", {error['pass']}" if "pass" in error else ""
        yield f"{what} ({error['op']} {error['sample']}{part}, sm_{error['chip']}): {error['message']}"
