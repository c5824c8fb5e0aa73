"""The plots of a run's report, all over the tokens trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tilewright.trainer.record import grad_norm_map
from tilewright.trainer.record.grad_norm_map import GradNorms
from tilewright.trainer.record.plot import COLORS, INK, Plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Series = npt.NDArray[np.float64]

_FIRST, _SECOND, _THIRD, *_ = COLORS
# Parts of a whole, from the bottom up, each in its colour.
_PHASES = {"forward": 0, "backward": 1, "reduce": 6, "optimizer": 2, "data": 3, "checkpoint": 4, "other": 7}
_KINDS = {"parameters": 0, "optimizer": 2, "average": 6, "gradients": 1, "whole_weights": 5, "activations": 3}
# More than a page's width can show; the extremes of each stretch stay, so that no spike is lost.
_MOST_POINTS = 1000
_MOST_BINS = 150  # of what is drawn as areas, each the mean of its stretch


def plots(
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    compressors: Mapping[str, float],
    norms: GradNorms,
) -> list[Plot]:
    """Every plot that there are figures for.

    Args:
        training: training lines, in order.
        evaluations: evaluation lines, in order.
        compressors: bits per byte of the same held-out text by the compressor's name, to be drawn as levels.
        norms: of the gradient by block, taken from the training lines.
    """
    tokens = _column(training, "tokens")
    # A step that was profiled says nothing of the speed of the others.
    timed = [{} if line.get("profiled") else line for line in training]
    drawn = [
        _loss(training, tokens),
        _bits_per_byte(training, evaluations, compressors),
        _curves(
            "Throughput",
            "Tokens per second over all processes.",
            tokens,
            {
                "each step": _column(timed, "tokens_per_second"),
                "since the start, pauses counted": _column(training, "tokens_per_second_since_start"),
            },
            "tokens/s",
        ),
        _curves(
            "MFU",
            "Of the matmul peak measured when the run started.",
            tokens,
            {"MFU": 100.0 * _column(timed, "mfu"), "HFU, with what is computed again": 100.0 * _hfu(timed)},
            "%",
        ),
        _time_by_phase(timed, tokens),
        _memory(training, tokens),
        _curves("Gradient norm", "Before clipping.", tokens, {"": _column(training, "grad_norm")}, ""),
        _norms_by_block(norms, tokens),
        _curves("Learning rate", "As each step used it.", tokens, {"": _column(training, "lr")}, ""),
    ]
    return [plot for plot in drawn if plot is not None]


def _hfu(training: Sequence[Mapping[str, Any]]) -> _Series:
    """Hardware FLOPs utilisation where it is another figure than MFU."""
    model, hardware = _column(training, "mfu"), _column(training, "hfu")
    return np.where(hardware != model, hardware, math.nan)


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

    caption = "Never trained on: a part on the way, all at the end."
    return Plot("Held-out text", caption, _svg("Held-out text", draw, _column(training, "tokens")))


def _curves(title: str, caption: str, tokens: _Series, curves: Mapping[str, _Series], unit: str) -> Plot | None:
    """One or two curves, by what each is called."""
    known = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    if not known:
        return None

    def draw(axes: Axes) -> None:
        for (name, values), color in zip(known.items(), (_FIRST, _SECOND), strict=False):
            axes.plot(*_thin(tokens, values), color=color, linewidth=1.3, label=name)
        # From zero, so that a curve that looks flat is flat.
        most = max(float(np.nanmax(values)) for values in known.values())
        axes.set_ylim(bottom=0, top=(1.08 if len(known) == 1 else 1.25) * most or 1.0)
        axes.set_ylabel(unit)
        if len(known) > 1:
            axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=len(known))

    return Plot(title, caption, _svg(title, draw, tokens))


def _time_by_phase(training: Sequence[Mapping[str, Any]], tokens: _Series) -> Plot | None:
    """What each step took, and of that each phase; a checkpoint adds to the step after it."""
    took = np.diff(tokens, prepend=0.0) / _column(training, "tokens_per_second")
    phases = {name: np.nan_to_num(_column(_parts(training, "seconds"), name)) for name in _PHASES}
    inside = sum(seconds for name, seconds in phases.items() if name not in ("checkpoint", "other"))
    phases["other"] = np.maximum(0.0, took - inside)
    known = np.isfinite(took) & (inside > 0)
    if not known.any():
        return None
    places = tokens[known]
    bins = np.array_split(np.arange(len(places)), min(_MOST_BINS, len(places)))
    shown = {name: np.array([seconds[known][part].mean() for part in bins]) for name, seconds in phases.items()}
    ends = np.array([places[part].mean() for part in bins])

    def draw(axes: Axes) -> None:
        total = _stack(axes, ends, shown, _PHASES)
        # The first step compiles: drawn in full, it would flatten all others.
        axes.set_ylim(bottom=0, top=1.35 * float(np.quantile(total, 0.95)))
        axes.set_ylabel("seconds a step")

    caption = "Of the first process; what goes out at the top compiles."
    return Plot("Time by phase", caption, _svg("Time by phase", draw, tokens))


def _memory(training: Sequence[Mapping[str, Any]], tokens: _Series) -> Plot | None:
    peak = 1e-9 * _column(training, "peak_memory_bytes")
    if not np.isfinite(peak).any():
        return None
    parts = {name: 1e-9 * _column(_parts(training, "memory"), name) for name in _KINDS}
    known = {name: values for name, values in parts.items() if np.isfinite(values).any() and np.nanmax(values) > 0}

    def draw(axes: Axes) -> None:
        if known:
            thin = np.unique(np.linspace(0, len(tokens) - 1, _MOST_BINS).astype(int))
            # Where a kind was not measured it is drawn as between the steps around.
            whole = {name: np.interp(tokens, tokens[np.isfinite(v)], v[np.isfinite(v)]) for name, v in known.items()}
            _stack(axes, tokens[thin], {name: values[thin] for name, values in whole.items()}, _KINDS)
        axes.plot(*_thin(tokens, peak), color=INK, linewidth=1.3, label="peak so far")
        axes.set_ylim(bottom=0, top=(1.35 if known else 1.08) * float(np.nanmax(peak)) or 1.0)
        axes.set_ylabel("GB")
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)

    caption = "Of the first process: by kind, and the most in use at once." if known else "The most in use at once."
    return Plot("Memory", caption, _svg("Memory", draw, tokens))


def _norms_by_block(norms: GradNorms, tokens: _Series) -> Plot | None:
    grid = norms.grid()
    if grid is None:
        return None
    title = "Gradient norm by block"
    caption = "The largest of each stretch: what explodes first is the first row to turn yellow."
    if np.isinf(grid.cells).any():
        caption += " Red: not finite."
    return Plot(title, caption, _svg(title, lambda axes: grad_norm_map.draw(axes, grid), tokens))


def _stack(axes: Axes, places: _Series, parts: Mapping[str, _Series], order: Mapping[str, int]) -> _Series:
    """Draw the parts that are there one above the other, with a legend; their sum."""
    names = [name for name in order if name in parts and parts[name].any()]
    values = np.stack([parts[name] for name in names])
    if len(places) == 1:
        # One place is a line without width.
        places, values = np.array([0.0, places[0]]), np.repeat(values, 2, axis=1)
    colors = [COLORS[order[name]] for name in names]
    labels = [name.replace("_", " ") for name in names]
    axes.stackplot(places, values, colors=colors, labels=labels, alpha=0.7, linewidth=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    total: _Series = values.sum(axis=0)
    return total


def _parts(training: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """A field of every line that has parts by name; none of them where it is missing."""
    return [line[key] if isinstance(line.get(key), Mapping) else {} for line in training]


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
