"""SVG plots that stand inside an HTML page of `trainer.page` and take its colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that are told apart in matplotlib's output, where each becomes a variable that the page sets, light or dark.
INK, SOFT, LINE = ("#010101", "#020202", "#030303")
# One for each curve of a plot.
COLORS = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{color: f"var(--{name})" for color, name in zip(COLORS, _NAMES, strict=True)},
}


@dataclass(frozen=True)
class Plot:
    """One plot: its title, a sentence on how to read it, and the ``<svg>`` element."""

    title: str
    caption: str
    svg: str


def svg(title: str, draw: Callable[[Axes], None], *, inches: tuple[float, float] = (5.0, 2.7)) -> str:
    """The ``<svg>`` element of a plot.

    Args:
        title: what the plot shows; its ids are made from it, so that it may stand on a page once.
        draw: puts the curves on the axes, in the colours of this module.
        inches: width and height; text is 9 points, whatever they are.
    """
    # Imported here because it takes longer than all the rest.
    import matplotlib
    from matplotlib.figure import Figure

    name = re.sub(r"\W+", "-", title.lower())
    look: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        # A name that a user gave is no mathematics, whatever it holds.
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(look):
        # No pyplot: it keeps figures for ever and may ask for a screen.
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _for_page(out.getvalue(), name, title)


def _for_page(drawn: str, name: str, title: str) -> str:
    """Matplotlib's file as an element among others: no prologue, ids of its own, the page's colours and font."""
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r' (id="|xlink:href="#)', rf" \1{name}-", drawn)
    drawn = drawn.replace("url(#", f"url(#{name}-")
    # The page says both, for all plots.
    drawn = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r" font-family: [^;\"]*;", "", drawn)
    for color, variable in _VARIABLES.items():
        drawn = drawn.replace(color, variable)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
