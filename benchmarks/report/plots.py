"""The plots of the pages: curves over the shapes of an op, and for each of many things a line of dots or a bar."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tilewright.trainer.record.plot import COLORS, INK, SOFT, Plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a ratio above 1, below it, and of one that may be either: the colours of "better", "worse" and what is soft.
_GAIN, _LOSS, _NEITHER = COLORS[2], COLORS[4], COLORS[7]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Point(NamedTuple):
    """A figure and the interval around it; both ends are the figure itself where it has none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One curve: its name, its points by shape, which of the page's colours it takes, and its line's style."""

    name: str
    points: Mapping[str, Point]
    color: int = 0
    line: str = "-"


@dataclass(frozen=True)
class Dots:
    """One line of dots: what it is about, and its figures by the name of the series that each belongs to."""

    label: str
    points: Mapping[str, Point] = field(default_factory=dict)


def over_shapes(
    title: str,
    caption: str,
    curves: Sequence[Curve],
    unit: str,
    *,
    log: bool = True,
    bars: Mapping[str, float] | None = None,
) -> Plot:
    """Curves over shapes, which stand beside each other in the order in which they first appear.

    Args:
        title: unique on its page.
        caption: how to read it.
        curves: in the order of the legend.
        unit: of the figures.
        log: whether equal distances are equal ratios; else the axis starts at 0, or at 1 where all figures lie above.
        bars: by shape, the most that a figure may be.
    """
    shapes = list(dict.fromkeys(shape for curve in curves for shape in curve.points))
    place = {shape: number for number, shape in enumerate(shapes)}

    def draw(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            # Side by side, so that curves which coincide are all seen.
            aside = min(0.5, 0.2 + 0.02 * len(shapes)) * ((number + 0.5) / len(curves) - 0.5)
            places = [place[shape] + aside for shape in curve.points]
            _draw_points(axes, places, list(curve.points.values()), curve, _MARKERS[number % len(_MARKERS)])
        for number, (shape, bar) in enumerate((bars or {}).items()):
            if shape in place:
                label = "bar" if number == 0 else None
                axes.plot([place[shape] - 0.4, place[shape] + 0.4], [bar] * 2, color=INK, linewidth=1.2, label=label)
        axes.set_xlim(-0.6, len(shapes) - 0.4)
        axes.set_xticks(
            range(len(shapes)),
            shapes,
            rotation=40,
            ha="right",
            rotation_mode="anchor",
            fontsize=7.5,
        )
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(unit)
        if log:
            _logarithmic(axes)
        else:
            values = [point.high for curve in curves for point in curve.points.values()] + list((bars or {}).values())
            lowest = min(point.low for curve in curves for point in curve.points.values())
            start = 0.98 if lowest >= 0.99 else 0.0
            axes.set_ylim(start, max(start + 0.12, start + 1.08 * (max(values) - start)))
        if len(curves) > 1 or bars:
            _legend(axes)

    longest = max(map(len, shapes))
    height = 2.3 + min(1.3, 0.045 * longest) + 0.17 * (-(-(len(curves) + bool(bars)) // 3))
    return Plot(title, caption, svg(title, draw, inches=(5.0, height)))


def lines_of_dots(
    title: str,
    caption: str,
    lines: Sequence[Dots],
    unit: str,
    *,
    log: bool = False,
    at: float | None = None,
    colors: Mapping[str, int] | None = None,
) -> Plot:
    """A line of dots for each of `lines`, the first on top.

    Args:
        title: unique on its page.
        caption: how to read it.
        lines: with the same names for the same series throughout.
        unit: of the figures.
        log: whether equal distances are equal ratios.
        at: a level that divides good from bad, drawn through all lines.
        colors: which of the page's colours each series takes; in the order of their names if not given.
    """
    names = list(dict.fromkeys(name for line in lines for name in line.points))
    labels, deepest = _wrapped([line.label for line in lines])

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            aside = 0.5 * ((number + 0.5) / len(names) - 0.5)
            drawn = [(place + aside, line.points[name]) for place, line in enumerate(lines) if name in line.points]
            number = colors[name] if colors else number
            color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
            places = [place for place, _ in drawn]
            axes.hlines(places, [p.low for _, p in drawn], [p.high for _, p in drawn], color=color, linewidth=1.1)
            values = [point.value for _, point in drawn]
            axes.plot(values, places, color=color, marker=marker, markersize=3.5, linestyle="none", label=name)
        if at is not None:
            axes.axvline(at, color=INK, linewidth=1.0)
            # What differs by next to nothing should look so.
            axes.set_xlim(min(axes.get_xlim()[0], 0.9 * at), max(axes.get_xlim()[1], 1.1 * at))
        _one_line_each(axes, labels)
        axes.set_xlabel(unit)
        if log:
            _logarithmic(axes, of="x")
        else:
            axes.set_xlim(left=0)
        if len(names) > 1:
            _legend(axes)

    height = 0.75 + (0.05 + 0.14 * deepest) * len(lines) + 0.17 * (-(-len(names) // 3))
    return Plot(title, caption, svg(title, draw, inches=(5.0, height)))


def bars_from_one(title: str, caption: str, ratios: Mapping[str, Point], unit: str) -> Plot:
    """A bar from 1 to each of `ratios`, the first on top, with its interval as a line, green where all of that lies
    above 1, red where all of it lies below.

    Args:
        title: unique on its page.
        caption: how to read it.
        ratios: by what they are about.
        unit: of the ratios.
    """
    labels, deepest = _wrapped(list(ratios))
    points = list(ratios.values())

    def draw(axes: Axes) -> None:
        places = range(len(points))
        colors = [_GAIN if point.low > 1 else _LOSS if point.high < 1 else _NEITHER for point in points]
        axes.barh(places, [point.value - 1 for point in points], left=1, height=0.5, color=colors)
        axes.hlines(places, [point.low for point in points], [point.high for point in points], color=INK, linewidth=1.1)
        axes.axvline(1, color=INK, linewidth=1.0)
        low, high = min(0.95, *(p.low for p in points)), max(1.05, *(p.high for p in points))
        # What differs by next to nothing should look so, and a figure stands behind each bar.
        axes.set_xlim(low * (low / high) ** 0.03, high * (high / low) ** 0.2)
        for place, point in enumerate(points):
            axes.annotate(
                f"{point.value:.2f}", (max(1, point.high), place), (4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
        _one_line_each(axes, labels)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
        _logarithmic(axes, of="x")

    return Plot(title, caption, svg(title, draw, inches=(5.0, 0.75 + (0.12 + 0.14 * deepest) * len(points))))


def _wrapped(labels: Sequence[str]) -> tuple[list[str], int]:
    """The labels in lines that fit beside the axes, and the most lines that one has."""
    wrapped = ["\n".join(textwrap.wrap(label, 42, max_lines=3, placeholder="…")) for label in labels]
    return wrapped, max(label.count("\n") for label in wrapped) + 1


def _one_line_each(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="y", length=0)


def _draw_points(axes: Axes, places: Sequence[float], points: Sequence[Point], curve: Curve, marker: str) -> None:
    color = COLORS[curve.color % len(COLORS)]
    axes.vlines(places, [point.low for point in points], [point.high for point in points], color=color, linewidth=1.1)
    axes.plot(
        places,
        [point.value for point in points],
        color=color,
        linestyle=curve.line,
        linewidth=1.0,
        marker=marker,
        markersize=3.5,
        label=curve.name,
    )


def _legend(axes: Axes) -> None:
    """Over the whole plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 72 // (max(map(len, labels)) + 8)))
    axes.figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside upper left", ncols=columns)


def _logarithmic(axes: Axes, of: str = "y") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.yaxis if of == "y" else axes.xaxis
    set_scale, limits = (axes.set_yscale, axes.get_ylim) if of == "y" else (axes.set_xscale, axes.get_xlim)
    set_scale("log")
    low, high = limits()
    # Enough marks to read a value by, whether the figures span a factor of 1.5 or of a million.
    marks = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 8 * low else (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
    axis.label.set_color(SOFT)
