"""The plots of a run's report, all over the tokens trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilewright.trainer.plot import COLORS, Plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Series = npt.NDArray[np.float64]

_FIRST, _SECOND, _THIRD, *_ = COLORS
# More than a page's width can show; the extremes of each stretch stay, so that no spike is lost.
_MOST_POINTS = 1000


def plots(
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    compressors: Mapping[str, float],
) -> list[Plot]:
    """Every plot that there are figures for.

    Args:
        training: training lines, in order.
        evaluations: evaluation lines, in order.
        compressors: bits per byte of the same held-out text by the compressor's name, to be drawn as levels.
    """
    tokens = _column(training, "tokens")
    drawn = [_loss(training, tokens), _bits_per_byte(training, evaluations, compressors)]
    for title, caption, key, scale, unit in (
        ("Throughput", "Tokens per second over all processes.", "tokens_per_second", 1.0, "tokens/s"),
        ("MFU", "Of the matmul peak measured when the run started.", "mfu", 100.0, "%"),
        ("Learning rate", "As each step used it.", "lr", 1.0, ""),
        ("Gradient norm", "Before clipping.", "grad_norm", 1.0, ""),
        ("Memory", "The most in use at once, so far.", "peak_memory_bytes", 1e-9, "GB"),
    ):
        drawn.append(_one_line(title, caption, tokens, scale * _column(training, key), unit))
    return [plot for plot in drawn if plot is not None]


def _loss(training: Sequence[Mapping[str, Any]], tokens: _Series) -> Plot | None:
    losses = _column(training, "loss")
    if not np.isfinite(losses).any():
        return None
    smooth = smoothed(losses)

    def draw(axes: Axes) -> None:
        axes.plot(*_thin(tokens, losses), color=_FIRST, alpha=0.35, linewidth=0.8)
        axes.plot(*_thin(tokens, smooth), color=_FIRST, linewidth=1.6)
        axes.set_ylabel("nats per token")

    return Plot("Training loss", "Faint: each step. Strong: smoothed.", _svg("Training loss", draw, tokens))


def _bits_per_byte(
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    compressors: Mapping[str, float],
) -> Plot | None:
    if not evaluations:
        return None
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = list(dict.fromkeys(name for line in evaluations for name in line["eval"]))

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            lines = [line for line in evaluations if name in line["eval"]]
            bits = _column([line["eval"][name] for line in lines], "bits_per_byte")
            style = ("-", "-.", ":")[number % 3]
            places = tokens_at(_column(lines, "step"), training)
            axes.plot(places, bits, color=_FIRST, linewidth=1.6, linestyle=style, marker="o", markersize=3, label=name)
        for (name, level), color in zip(compressors.items(), (_SECOND, _THIRD), strict=False):
            axes.axhline(level, color=color, linewidth=1.2, linestyle="--", label=f"{name}: {level:.3f}")
        # Most of the fall is in the first steps; what follows, beside the compressors, is what one looks for.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("bits per byte")
        axes.legend(frameon=False, fontsize=8, loc="upper right")

    caption = "Text never trained on: a part of it on the way, all of it at the end."
    return Plot("Held-out text", caption, _svg("Held-out text", draw, _column(training, "tokens")))


def _one_line(title: str, caption: str, tokens: _Series, values: _Series, unit: str) -> Plot | None:
    if not np.isfinite(values).any():
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*_thin(tokens, values), color=_FIRST, linewidth=1.3)
        # From zero, so that a curve that looks flat is flat.
        axes.set_ylim(bottom=0, top=1.08 * float(np.nanmax(values)) or 1.0)
        axes.set_ylabel(unit)

    return Plot(title, caption, _svg(title, draw, tokens))


def smoothed(values: _Series) -> _Series:
    """Mean of the values around each, over a fortieth of the curve and at least 5; what is not finite is left out."""
    window = np.ones(2 * max(2, len(values) // 80) + 1)
    if not len(values):
        return values
    finite = np.isfinite(values)
    # Centred, since an average of the past lags behind a falling loss. "full" and a cut, for curves shorter than it.
    half = len(window) // 2
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    weight = np.convolve(finite.astype(np.float64), window)[half : half + len(values)]
    means: _Series = np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)
    return means


def tokens_at(steps: _Series, training: Sequence[Mapping[str, Any]]) -> _Series:
    """Tokens trained on after each of `steps`, between recorded steps by proportion; 0 at step 0."""
    places: _Series = np.interp(steps, [0.0, *_column(training, "step")], [0.0, *_column(training, "tokens")])
    return places


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> _Series:
    """One field of every line, NaN where it is missing or null."""
    values = (line.get(key) for line in lines)
    return np.array([value if isinstance(value, (int, float)) else math.nan for value in values], dtype=np.float64)


def _thin(places: _Series, values: _Series) -> tuple[_Series, _Series]:
    """The curve with the lowest and highest point of each stretch alone, where it has too many to draw."""
    if len(values) <= _MOST_POINTS:
        return places, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(values)), _MOST_POINTS // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept += sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])})
    return places[kept], values[kept]


def _svg(title: str, draw: Callable[[Axes], None], tokens: _Series) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def over_tokens(axes: Axes) -> None:
        draw(axes)
        axes.set_xlabel("tokens")
        # The same for all plots, so that one looks up and down at the same moment of the run.
        axes.set_xlim(0, 1.02 * float(np.nanmax(tokens, initial=0.0)) or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))

    return svg(title, over_tokens)


def _tick(value: float) -> str:
    power = ""
    for power_above in ("k", "M", "B", "T"):
        if abs(value) < 1000:
            break
        value, power = value / 1000, power_above
    return f"{value:g} {power}".rstrip()
