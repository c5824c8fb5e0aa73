"""The page of an audit: what the compiler made of every kernel, what it issues, and the floor that both predict."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright.benchmarks.audit.bars import BARS, verdicts
from tilewright.benchmarks.audit.chips import CHIPS
from tilewright.benchmarks.report.peers_section import against_peers
from tilewright.benchmarks.report.plots import Curve, Dots, Point, lines_of_dots, over_shapes
from tilewright.benchmarks.report.tables import (
    PLACE,
    Cell,
    amount,
    chip_name,
    folded,
    place,
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

_Row = dict[str, Any]
_PASSES = ("forward", "backward", "both")
_LINES = ("-", "--", ":")


def write(audit: _Row, path: Path) -> None:
    """Write the page of an audit as ``tilewright audit --json`` gives it.

    Raises:
        TrainingError: it cannot be written there.
    """
    sections = [
        _header(audit),
        page.cards(_headlines(audit)),
        _errors(audit),
        _bars(audit),
        against_peers(audit.get("comparison") or []),
        _traffic(audit),
        _compiled(audit),
        _floors(audit),
        page.environment(audit.get("environment") or {}),
    ]
    page.write(path, page.document("Audit of the kernels", sections))


def _header(audit: _Row) -> str:
    chips = sorted({kernel["chip"] for kernel in audit["kernels"].values()})
    names = ", ".join(f"{chip_name(chip)} ({CHIPS[chip].name})" if chip in CHIPS else chip_name(chip) for chip in chips)
    line = (
        f"Compiled for {names}, with no GPU. Bytes and operations were counted in Triton's interpreter, at a small "
        "size of the same launches. Nothing on this page was timed: every time is predicted."
    )
    return f"<header>\n<h1>Audit of the kernels</h1>\n{soft(line)}\n</header>"


def _headlines(audit: _Row) -> Iterator[tuple[str, str, str]]:
    kernels = list(audit["kernels"].values())
    yield "launches", f"{len(audit['launches']):,}", f"of {len({row['op'] for row in audit['launches']})} ops"
    yield "kernels compiled", f"{len(kernels):,}", "each distinct one once"
    spilling = [kernel for kernel in kernels if _spills(kernel) or kernel.get("stack_bytes")]
    yield "with spills or stack", str(len(spilling)), ", ".join(sorted({k["kernel"] for k in spilling})[:4])
    for key, label in (("byte_ratio", "most bytes issued"), ("flop_ratio", "most FLOPs issued")):
        rows = [row for row in audit["traffic"] if _is_plotted(audit, row, key)]
        if rows:
            worst = max(rows, key=lambda row: float(row[key]))
            yield label, f"{worst[key]:.2f}", f"times what is needed: {worst['op']} {worst['pass']}, {worst['sample']}"


def _errors(audit: _Row) -> str:
    listed = table((*PLACE, "error"), ([*place(error), error["message"]] for error in audit.get("errors") or []))
    return section("Errors", warning("Some launches could not be examined."), listed) if listed else ""


def _bars(audit: _Row) -> str:
    judged = [verdict for verdict in verdicts(audit) if verdict.met is not None]
    missed = sum(not verdict.met for verdict in judged)
    rows: list[list[str | Cell]] = [
        [
            verdict.bar.name,
            Cell(f"{verdict.bar.bound:g}"),
            Cell(f"{verdict.worst.value:.4g}" if verdict.worst else "n/a"),
            Cell("met" if verdict.met else "missed", "better" if verdict.met else "worse"),
            Cell(f"{verdict.rows:,}"),
            verdict.worst.row if verdict.worst else "no row was held to it",
        ]
        for verdict in judged
    ]
    listed = table(("bar", "at most", "worst", "", "rows", "the worst row"), rows)
    return section("Bars", soft(f"{len(judged) - missed} of {len(judged)} are met."), listed) if judged else ""


def _bounds(audit: _Row) -> dict[str, float]:
    """What each row of traffic that has a bar may reach at most, by its place in one string, as the bars name it."""
    return {figure.row: bar.bound for bar in BARS for figure in bar.figures(audit)}


def _traffic(audit: _Row) -> str:
    bounds = _bounds(audit)
    drawn = [
        plot
        for op in dict.fromkeys(row["op"] for row in audit["traffic"])
        for key in ("byte_ratio", "flop_ratio")
        if (plot := _ratio_plot(audit, op, key, bounds)) is not None
    ]
    header = (*PLACE, "bytes issued", "÷ needed", "FLOPs issued", "÷ needed", "note")
    rows = (
        [
            *place(row),
            Cell(amount(row.get("bytes_issued"))),
            Cell(_two(row.get("byte_ratio"))),
            Cell(_scientific(row.get("flops_issued"))),
            Cell(_two(row.get("flop_ratio"))),
            row.get("note") or "",
        ]
        for row in audit["traffic"]
    )
    return section(
        "Issued ÷ needed",
        soft(
            "Needed: each input read once and each output written once; the operations of the definition, for "
            "attention those of the pass's own matrix products. Where one read serves both passes, only both together "
            "have a ratio. Bytes are of requests: what attention reads again comes mostly from the L2 cache, so there "
            "its operations are shown."
        ),
        side_by_side(drawn),
        folded(f"All {len(audit['traffic']):,} rows", table(header, rows)),
    )


def _is_plotted(audit: _Row, row: _Row, key: str) -> bool:
    """Bytes of what memory bounds, operations of what the tensor cores do."""
    return row.get(key) is not None and (key == "flop_ratio") == bool(audit["ops"][row["op"]]["matmuls"])


def _ratio_plot(audit: _Row, op: str, key: str, bounds: Mapping[str, float]) -> Plot | None:
    rows = [row for row in audit["traffic"] if row["op"] == op and _is_plotted(audit, row, key)]
    by_width = key == "byte_ratio"
    if by_width:
        rows.sort(key=lambda row: int(row["width"]))

    def shape(row: _Row) -> str:
        return f"{row['width']:,}" if by_width else shape_of(row)

    curves = [
        Curve(name, _worst((shape(row), row[key]) for row in of), number)
        for number, name in enumerate(_PASSES)
        if (of := [row for row in rows if row["pass"] == name])
    ]
    if not curves:
        return None
    what = "Bytes" if key == "byte_ratio" else "FLOPs"
    caption = f"{what} issued ÷ needed, the worst of all options and chips{', over row width' if by_width else ''}."
    bars = {shape(row): bounds[at] for row in rows if (at := " ".join(place(row))) in bounds}
    return over_shapes(f"{op}: {what} issued", caption, curves, "issued ÷ needed", log=False, bars=bars)


def _compiled(audit: _Row) -> str:
    groups: dict[tuple[str, int], list[_Row]] = {}
    for kernel in audit["kernels"].values():
        groups.setdefault((kernel["kernel"], kernel["chip"]), []).append(kernel)
    launched = [audit["kernels"].get(row["kernel"], {}) for row in audit["launches"]]
    launches = Counter((kernel.get("kernel"), kernel.get("chip")) for kernel in launched)
    drawn = [
        _kernel_plot(groups, "Registers", "Of one thread; 255 is the most.", lambda k: k["registers"], "registers"),
        _kernel_plot(groups, "Occupancy", "Resident warps of those that fit.", lambda k: 100 * k["occupancy"], "%"),
    ]
    header = ("kernel", "chip", "variants", "launches", "registers", "spills", "stack", "shared memory",
              "blocks per SM", "occupancy", "limited by", "128-bit accesses", "tensor cores", "hottest loop",
              "compile")  # fmt: skip
    rows = (_kernel_row(*group, kernels, launches[group]) for group, kernels in groups.items())
    return section(
        "What the compiler made of them",
        soft("Dot: the median over what a kernel is compiled for; line: from the least to the greatest."),
        side_by_side(drawn),
        folded(f"All {len(groups)} kernels and chips", table(header, rows)),
        folded(f"All {len(audit['launches']):,} launches", _launch_table(audit)),
    )


def _kernel_plot(
    groups: Mapping[tuple[str, int], Sequence[_Row]],
    title: str,
    caption: str,
    figure: Callable[[_Row], float],
    unit: str,
) -> Plot:
    lines: dict[str, dict[str, Point]] = {}
    for (name, chip), kernels in groups.items():
        values = [figure(kernel) for kernel in kernels]
        lines.setdefault(name, {})[chip_name(chip)] = Point(statistics.median(values), min(values), max(values))
    return lines_of_dots(title, caption, [Dots(name, of) for name, of in lines.items()], unit)


def _kernel_row(name: str, chip: int, kernels: Sequence[_Row], launches: int) -> list[str | Cell]:
    spills, stack = max(map(_spills, kernels)), max(kernel.get("stack_bytes") or 0 for kernel in kernels)
    products = {kind for kernel in kernels for kind in kernel.get("tensor_cores") or {}}
    return [
        name,
        chip_name(chip),
        Cell(str(len(kernels))),
        Cell(str(launches)),
        Cell(_span(kernel["registers"] for kernel in kernels)),
        Cell(str(spills), "number worse" if spills else "number"),
        Cell(amount(stack), "number worse" if stack else "number"),
        Cell(f"{max(kernel['shared_bytes'] for kernel in kernels) / 1024:.3g} KiB"),
        Cell(_span(kernel["blocks_per_processor"] for kernel in kernels)),
        Cell(f"{_span(round(100 * kernel['occupancy']) for kernel in kernels)}%"),
        ", ".join(dict.fromkeys(str(kernel["limited_by"]) for kernel in kernels)),
        Cell(f"{_span(round(100 * share) for share in map(_wide_share, kernels) if share is not None)}%"),
        ", ".join(sorted(products)),
        _mix(max(kernels, key=lambda kernel: (kernel.get("hottest_loop") or {}).get("instructions") or 0)),
        Cell(seconds(sum(kernel.get("compile_seconds") or 0 for kernel in kernels))),
    ]


def _launch_table(audit: _Row) -> str:
    header = (*PLACE, "kernel", "grid", "warps", "stages", "constants", "registers", "spills", "stack",
              "shared memory", "occupancy", "128-bit accesses", "tensor cores")  # fmt: skip
    return table(header, (_launch_row(row, audit["kernels"].get(row["kernel"], {})) for row in audit["launches"]))


def _launch_row(row: _Row, kernel: _Row) -> list[str | Cell]:
    blocks = {name: value for name, value in (kernel.get("constants") or {}).items() if "BLOCK" in name}
    products = kernel.get("tensor_cores") or {}
    return [
        *place(row),
        str(kernel.get("kernel", "")),
        " × ".join(map(str, row["grid"])),  # noqa: RUF001
        Cell(str(kernel.get("num_warps", ""))),
        Cell(str(kernel.get("num_stages", ""))),
        ", ".join(f"{name} {value}" for name, value in blocks.items()),
        Cell(str(kernel.get("registers", ""))),
        Cell(str(_spills(kernel))),
        Cell(amount(kernel.get("stack_bytes"))),
        Cell(amount(kernel.get("shared_bytes"))),
        Cell(percent(kernel.get("occupancy"))),
        Cell(percent(_wide_share(kernel))),
        ", ".join(f"{count} {kind}" for kind, count in products.items()),
    ]


def _floors(audit: _Row) -> str:
    floors = [row for row in audit["floors"] if row.get("predicted_microseconds") is not None]
    ops = dict.fromkeys(row["op"] for row in floors)
    drawn = [_floor_plot(op, [row for row in floors if row["op"] == op]) for op in ops]
    rows = (
        [*place(row), Cell(seconds(1e-6 * row["predicted_microseconds"])), row.get("bound") or ""] for row in floors
    )
    return section(
        "The roofline floor, predicted",
        soft(
            "Predicted, not measured: the bytes that a pass issues at the datasheet's bandwidth, or the operations of "
            "its matrix products at the datasheet's dense bfloat16 peak, whichever takes longer. Where nothing could "
            "be counted, what the op needs stands in for what it issues. How near a kernel comes to its floor, only a "
            "GPU can tell."
        ),
        side_by_side(drawn),
        folded(f"All {len(floors):,} floors, predicted", table((*PLACE, "floor, predicted", "bound by"), rows)),
    )


def _floor_plot(op: str, rows: Sequence[_Row]) -> Plot:
    chips = sorted({row["chip"] for row in rows})
    curves = []
    for color, chip in enumerate(chips):
        for line, name in zip(_LINES, _PASSES, strict=True):
            if of := [row for row in rows if (row["chip"], row["pass"]) == (chip, name)]:
                points = _worst((shape_of(row), row["predicted_microseconds"]) for row in of)
                curves.append(Curve(f"{name}, {chip_name(chip)}", points, color, line))
    return over_shapes(f"{op}: floor, predicted", "The slowest of all options.", curves, "µs, predicted")


def shape_of(row: _Row) -> str:
    """The model and the sequence of a sample, without its options: "8B 2k" of "8B 2k, fused"."""
    first, *options = str(row["sample"]).split(", ")
    length = options[-1].split(" ")[-1] if options else ""
    return f"{first} {length}" if length[:-1].isdigit() and length.endswith("k") else first


def _worst(values: Iterable[tuple[str, float]]) -> dict[str, Point]:
    """The greatest value of each shape."""
    worst: dict[str, float] = {}
    for shape, value in values:
        worst[shape] = max(value, worst.get(shape, value))
    return {shape: Point(value, value, value) for shape, value in worst.items()}


def _spills(kernel: _Row) -> int:
    return (kernel.get("spill_loads") or 0) + (kernel.get("spill_stores") or 0)


def _wide_share(kernel: _Row) -> float | None:
    accesses = kernel.get("global_accesses")
    return kernel["wide_accesses"] / accesses if accesses else None


def _mix(kernel: _Row) -> str:
    loop = kernel.get("hottest_loop") or {}
    mix = {name: count for name, count in (loop.get("mix") or {}).items() if count}
    shares = ", ".join(f"{count} {name}" for name, count in sorted(mix.items(), key=lambda pair: -pair[1]))
    return f"{loop['instructions']}: {shares}" if loop.get("instructions") else "none"


def _span(values: Iterable[int]) -> str:
    listed = list(values)
    if not listed:
        return "n/a "
    low, high = min(listed), max(listed)
    return str(low) if low == high else f"{low} to {high}"


def _two(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _scientific(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
