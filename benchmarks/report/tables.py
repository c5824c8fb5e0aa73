"""Tables of figures for the pages of `trainer.page`, and figures as they stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from tilewright.benchmarks.report.plots import Point
from tilewright.trainer.record import page
from tilewright.trainer.record.plot import Plot


class Cell(NamedTuple):
    """One cell: its text, and the classes of the page's style that it takes."""

    text: str
    style: str = "number"


def ratio_cell(ratio: Point | None, *, above_one: str = "worse", below_one: str = "better") -> Cell:
    """A ratio with its interval, in the style for that side of 1 on which all of it lies; empty for None."""
    if ratio is None:
        return Cell("")
    interval = "" if ratio.low == ratio.high else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    verdict = above_one if ratio.low > 1 else below_one if ratio.high < 1 else ""
    return Cell(f"{ratio.value:.2f}{interval}", f"number {verdict}".strip())


def table(header: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """A table that scrolls sideways where the window is narrow; empty where there are no rows.

    Args:
        header: a heading for each column.
        rows: words are aligned left, figures (`Cell`) as their style says.
    """
    listed = [[cell if isinstance(cell, Cell) else Cell(cell, "") for cell in row] for row in rows]
    if not listed:
        return ""
    # A heading stands over its column as the column's first figure does.
    styles = ["number" if "number" in cell.style else "" for cell in listed[0]]
    head = _row("th", map(Cell, header, styles))
    body = "\n".join(_row("td", row) for row in listed)
    return f'<div class="card data"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def side_by_side(drawn: Iterable[Plot]) -> str:
    """Plots side by side; nothing where there are none."""
    listed = list(drawn)
    return page.plots(listed) if listed else ""


def folded(summary: str, inner: str) -> str:
    """Something long that opens when the reader asks for it."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{inner}\n</details>" if inner else ""


def section(title: str, *parts: str) -> str:
    """Parts under a heading; nothing where all of them are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def chip_name(chip: int) -> str:
    """As compilers write it: sm_90."""
    return f"sm_{chip}"


# What the rows of an audit begin with.
PLACE = ("op", "shape", "chip", "pass")


def place(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The place of an audit's row, as `PLACE` heads it; an error may be of no one pass."""
    return row["op"], row["sample"], chip_name(row["chip"]), row.get("pass", "")


def soft(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="soft">{escape(text)}</p>'


def warning(text: str) -> str:
    """A paragraph that nobody should miss."""
    return f'<p class="note"><b>{escape(text)}</b></p>'


def seconds(value: float | None) -> str:
    """1.23 ms, of a time in seconds."""
    return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")))


def amount(byte_count: float | None) -> str:
    """12.3 MB, of powers of 1,000 bytes."""
    return _scaled(byte_count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def _scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """Three digits in the largest unit that the value reaches, else in the smallest."""
    if value is None:
        return "n/a"
    # What would be printed as 1000 of a unit belongs to the next.
    scale, unit = next((pair for pair in units if abs(value) >= 0.9995 * pair[0]), units[-1])
    number = value / scale
    return f"{number:,.0f} {unit}" if abs(number) >= 999.5 else f"{number:.3g} {unit}"


def _row(tag: str, cells: Iterable[Cell]) -> str:
    inner = "".join(
        f'<{tag} class="{cell.style}">{escape(cell.text)}</{tag}>'
        if cell.style
        else f"<{tag}>{escape(cell.text)}</{tag}>"
        for cell in cells
    )
    return f"<tr>{inner}</tr>"
