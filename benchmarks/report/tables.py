"""Tables of figures for the pages of `trainer.page`, and figures as they stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """One cell: its text, and the classes of the page's style that it takes."""

    text: str
    style: str = "number"


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


def folded(summary: str, inner: str) -> str:
    """Something long that opens when the reader asks for it."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{inner}\n</details>" if inner else ""


def section(title: str, *parts: str) -> str:
    """Parts under a heading; nothing where all of them are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


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
