"""Gradient norms by block over a run, as a picture: tokens from left to right, the model from top to bottom."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 320  # two pixels each, at the width that a page gives a plot
_MOST_LABELS = 12
# Of no colour in the map, on a light page and on a dark one.
_NOT_FINITE = (0.91, 0.07, 0.18, 1.0)


class Grid(NamedTuple):
    """What the picture shows.

    Attributes:
        places: of the model, from its input to its output.
        end: tokens at the right edge; the left one is at none.
        cells: (places, columns), the largest norm of the steps in each stretch of tokens: NaN where none is known,
            infinite where one was not finite.
    """

    places: list[str]
    end: float
    cells: npt.NDArray[np.float64]


class GradNorms:
    """The gradient norms of all steps, at 4 bytes each: as lines of JSON those of 100,000 steps take gigabytes."""

    def __init__(self) -> None:
        self._places: dict[str, None] = {}  # in the model's order
        self._tokens: list[float] = []
        self._rows: list[array[float]] = []

    def take(self, line: dict[str, Any]) -> None:
        """Move the norms of a training line from there to here."""
        norms, tokens = line.pop("grad_norms", None), line.get("tokens")
        if not isinstance(norms, dict) or not norms or not isinstance(tokens, (int, float)):
            return
        self._places |= dict.fromkeys(norms)
        self._tokens.append(tokens)
        self._rows.append(array("f", (_norm(norms.get(place, math.nan)) for place in self._places)))

    def grid(self) -> Grid | None:
        """The norms by place and stretch of tokens; None where there are none."""
        if not self._rows or not self._tokens[-1] > 0:
            return None
        norms = np.full((len(self._places), len(self._rows)), np.nan)
        for step, row in enumerate(self._rows):
            norms[: len(row), step] = row
        ends = np.array(self._tokens)
        edges = np.linspace(0.0, ends[-1], min(_MOST_COLUMNS, len(ends)) + 1)
        # The steps that a stretch has a part of; half a token keeps out one that only touches it.
        first = np.searchsorted(ends, edges[:-1] + 0.5)
        last = np.searchsorted(ends, edges[1:] - 0.5)
        columns = [np.fmax.reduce(norms[:, a : b + 1], axis=1) for a, b in zip(first, last, strict=True)]
        return Grid(list(self._places), float(ends[-1]), np.stack(columns, axis=1))


def _norm(value: object) -> float:
    """As a number: null stands for one that was not finite."""
    if value is None:
        return math.inf
    return float(value) if isinstance(value, (int, float)) else math.nan


def draw(axes: Axes, grid: Grid) -> None:
    """Draw the picture, its rows named and its colours explained."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator

    norm, colors = _scale(grid.cells), matplotlib.colormaps["viridis"]
    picture = colors(norm(np.where(np.isfinite(grid.cells), grid.cells, norm.vmin)))
    picture[np.isinf(grid.cells)] = _NOT_FINITE
    picture[np.isnan(grid.cells), 3] = 0.0
    # As an image: a rectangle for each cell would make a page of megabytes.
    edges = (0.0, grid.end, len(grid.places) - 0.5, -0.5)
    axes.imshow(picture, extent=edges, aspect="auto", interpolation="none")
    rows = _labelled(grid.places)
    axes.set_yticks(rows, [grid.places[row] for row in rows])
    axes.grid(visible=False)
    few_decades = norm.vmax < 100 * norm.vmin
    bar = axes.figure.colorbar(
        ScalarMappable(norm, colors),
        ax=axes,
        label="2-norm",
        ticks=LogLocator(subs=(1, 2, 5) if few_decades else (1,)),
        format=FuncFormatter(lambda value, _: f"{value:g}"),
        pad=0.02,
    )
    bar.minorticks_off()
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # else it is 256 rectangles


def _scale(cells: npt.NDArray[np.float64]) -> Any:
    from matplotlib.colors import LogNorm

    known = cells[np.isfinite(cells) & (cells > 0)]
    if not len(known):
        return LogNorm(0.1, 1.0)
    # All of the highest, where something explodes; not the few lowest, such as a layer's that starts at zero. And a
    # factor of two at least, so that what hardly differs looks the same.
    highest = float(known.max())
    return LogNorm(min(float(np.quantile(known, 0.01)), highest / 2), highest, clip=True)


def _labelled(places: Sequence[str]) -> list[int]:
    """The rows that are named: all of a few, else the outermost and of the blocks every tenth, say."""
    apart = math.ceil(len(places) / _MOST_LABELS)
    every = next(n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power >= apart)
    numbers = [place.rpartition(".")[2] for place in places]
    blocks = [row for row, number in enumerate(numbers) if number.isdigit() and int(number) % every == 0]
    named: list[int] = []
    for row in (0, len(places) - 1, *blocks, *range(len(places))):
        if all(abs(row - other) >= apart for other in named):
            named.append(row)
    return sorted(named)
