"""What one sees while a run trains: a live panel on a terminal, plain lines where the output goes to a file.

with Display() if rank == 0 else NullDisplay() as display:
    display.start("quickstart", total_steps=800, start_step=0, facts={"parameters": "4.2 M"})
    display.step(**line)
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeGuard, Unpack

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tilewright.trainer.record.metrics import TrainingLine
from tilewright.trainer.record.quantities import decimal, duration, gigabytes, percent, short

_PLAIN_SECONDS = 5.0
_RECENT_STEPS = 50
_SPARKLINE_WIDTH = 60
_BARS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "!"

_Results = Mapping[str, Mapping[str, float]]


class Display:
    """Shows the run on `console`: live if that is a terminal, in plain lines otherwise.

    The lines of training are about 5 seconds apart; the first, the last and all evaluations are always there.

    Args:
        console: standard output if None.
        clock: seconds, from any origin.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console()
        self._progress = _Progress(clock)
        self._live: Live | None = None
        self._last_plain_line: float | None = None

    def start(self, name: str, total_steps: int, start_step: int, facts: Mapping[str, str]) -> None:
        """Begin.

        Args:
            name: the run's name.
            total_steps: optimizer steps of the whole run.
            start_step: steps done before this process, by the run that it resumes.
            facts: what to say once, before the first step, by what it is called.
        """
        self._progress.start(name, total_steps, start_step)
        resumed = f", from step {start_step:,}" if start_step else ""
        self._print(f"{name}: {total_steps:,} steps{resumed}", style="bold")
        width = max(map(len, facts), default=0)
        for fact, value in facts.items():
            self._print(f"  {fact:<{width}}  {value}")
        if self.console.is_terminal:
            # Drawn again by rich's own thread, so that the clocks go on through a long step.
            self._live = Live(get_renderable=self.panel, console=self.console, refresh_per_second=4)
            self._live.start()

    def step(self, **fields: Unpack[TrainingLine]) -> None:
        """Show a step that was done."""
        self._progress.step(fields)
        if self._live is None and self._line_is_due(fields["step"]):
            self._last_plain_line = self._progress.clock()
            self._print(self._plain_line(fields))

    def evaluation(self, step: int, results: _Results) -> None:
        """Show an evaluation after `step` steps: for each evaluated set its loss, perplexity, bits_per_byte, tokens."""
        self._progress.evaluated = (step, {name: dict(result) for name, result in results.items()})
        if self._live is None:
            for name, result in results.items():
                place, tokens = f"eval {step}/{self._progress.total_steps}", f"{result['tokens']:,.0f} tokens"
                self._print(f"{place}  {name}  {_evaluation_text(result)}  {tokens}")

    def message(self, text: str) -> None:
        """Show a line of text."""
        self._print(text)

    def stop(self) -> None:
        """End; what a terminal shows stays there. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        # Whole lines as they are: a log is searched, and brackets in a name are no markup.
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _line_is_due(self, step: int) -> bool:
        last = self._last_plain_line
        return last is None or step >= self._progress.total_steps or self._progress.clock() - last >= _PLAIN_SECONDS

    def _plain_line(self, fields: TrainingLine) -> str:
        left = self._progress.seconds_left()
        parts = [
            f"step {fields['step']}/{self._progress.total_steps}",
            f"loss {fields['loss']:.3f}",
            f"lr {fields['lr']:.1e}",
            f"grad {decimal(fields['grad_norm'])}",
            f"{fields['tokens_per_second']:,.0f} tokens/s",
            f"MFU {percent(fields['mfu'])}",
            gigabytes(fields["peak_memory_bytes"]),
        ]
        return "  ".join(parts if left is None else [*parts, f"{duration(left)} left"])

    def panel(self) -> RenderableType:
        """The live panel as it stands."""
        progress = self._progress
        body: list[RenderableType] = [_bar(progress.steps_done, progress.total_steps), self._figures()]
        losses = progress.losses.values()
        if losses and not self.console.options.ascii_only:
            width = min(_SPARKLINE_WIDTH, self.console.width - 12)
            body.append(Text.assemble(("loss  ", "dim"), (_sparkline(losses, width), "cyan"), overflow="crop"))
        if progress.evaluated is not None:
            step, results = progress.evaluated
            body.extend(
                Text.assemble((f"{name}  ", "dim"), _evaluation_text(result), (f"  at step {step:,}", "dim"))
                for name, result in results.items()
            )
        return Panel(Group(*body), title=Text(progress.name), title_align="left", border_style="dim")

    def _figures(self) -> Table:
        progress, line = self._progress, self._progress.line
        left = progress.seconds_left()
        cells = [("elapsed", duration(progress.elapsed())), ("left", "..." if left is None else duration(left))]
        if line is not None:
            cells = [
                ("loss", f"{line['loss']:.3f}"),
                ("tokens/s", f"{line['tokens_per_second']:,.0f}"),
                cells[0],
                ("lr", f"{line['lr']:.1e}"),
                ("MFU", percent(line["mfu"])),
                cells[1],
                ("grad norm", decimal(line["grad_norm"])),
                ("memory", gigabytes(line["peak_memory_bytes"])),
                ("tokens", short(line["tokens"])),
                *_further_figures(line),
            ]
        columns = 3 if self.console.width >= 70 else 2
        grid = Table.grid(padding=(0, 2))
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="right", no_wrap=True, min_width=9)
        for first in range(0, len(cells), columns):
            grid.add_row(*itertools.chain(*cells[first : first + columns]))
        return grid


class NullDisplay(Display):
    """Shows nothing: for the processes of a run that do not report."""

    def __init__(self) -> None:
        pass

    def start(self, name: str, total_steps: int, start_step: int, facts: Mapping[str, str]) -> None:
        pass

    def step(self, **fields: Unpack[TrainingLine]) -> None:
        pass

    def evaluation(self, step: int, results: _Results) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class _Progress:
    """How far the run has come, and how fast."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.name = ""
        self.total_steps = 0
        self.steps_done = 0
        self.line: TrainingLine | None = None
        self.losses = _Trace(4 * _SPARKLINE_WIDTH)
        self.evaluated: tuple[int, dict[str, dict[str, float]]] | None = None
        self._started = clock()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)

    def start(self, name: str, total_steps: int, start_step: int) -> None:
        self.name, self.total_steps, self.steps_done = name, total_steps, start_step
        self._started = self.clock()

    def step(self, line: TrainingLine) -> None:
        if line["step"] <= self.steps_done:
            self._recent.clear()  # the run went back: what it took between two of these steps says nothing
        self.line = line
        self.steps_done = line["step"]
        self.losses.add(line["loss"])
        self._recent.append((self.clock(), line["step"]))

    def elapsed(self) -> float:
        """Seconds since the start of this process's part of the run."""
        return self.clock() - self._started

    def seconds_left(self) -> float | None:
        """At the pace of the recent steps, evaluations and checkpoints between them included; None before the second.

        The time up to the first step, in which code is compiled, says nothing of the others.
        """
        if len(self._recent) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step == first_step:
            return None
        return (self.total_steps - last_step) * (last_time - first_time) / (last_step - first_step)


def _bar(done: int, total: int) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    part = done / max(total, 1)
    row.add_row(ProgressBar(total=1.0, completed=part), f"step {done:,}/{total:,}  {part:.0%}")
    return row


def _further_figures(line: TrainingLine) -> Iterator[tuple[str, str]]:
    """What is not known of every step, nor in the record of an older version."""
    if _is_known(hfu := line.get("hfu")) and hfu != line["mfu"]:
        yield "HFU", percent(hfu)
    if _is_known(overall := line.get("tokens_per_second_since_start")):
        yield "since start", f"{overall:,.0f}/s"
    if _is_known(activations := (line.get("memory") or {}).get("activations")):
        yield "activations", gigabytes(activations)


def _is_known(figure: float | None) -> TypeGuard[float]:
    return figure is not None and math.isfinite(figure)


def _evaluation_text(result: Mapping[str, float]) -> str:
    """The figures of one evaluated set."""
    return f"{result['bits_per_byte']:.3f} bits/byte  loss {result['loss']:.3f}  perplexity {result['perplexity']:,.1f}"


class _Trace:
    """A curve of any length in bounded memory: where it grows past twice `points`, neighbours are averaged."""

    def __init__(self, points: int) -> None:
        self._points = points
        self._per_value = 1
        self._values: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) == self._per_value:
            self._values.append(sum(self._pending) / self._per_value)
            self._pending = []
        if len(self._values) == 2 * self._points:
            self._values = [(a + b) / 2 for a, b in zip(self._values[::2], self._values[1::2], strict=True)]
            self._per_value *= 2

    def values(self) -> list[float]:
        return list(self._values)


def _sparkline(values: Sequence[float], width: int) -> str:
    """The curve in at most `width` characters, from ▁ at its lowest to █ at its highest; ! where it is not finite."""
    columns = min(width, len(values))
    # Each column is the mean of its part of the curve.
    ends = [len(values) * column // columns for column in range(columns + 1)] if columns else [0]
    means = [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return _NOT_FINITE * columns
    low, high = min(finite), max(finite)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] if math.isfinite(mean) else _NOT_FINITE for mean in means)
