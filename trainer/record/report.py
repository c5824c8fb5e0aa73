"""`report.html`: one page that shows a run and needs nothing but a browser: no network, no scripts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record import page
from tilewright.trainer.record.grad_norm_map import GradNorms
from tilewright.trainer.record.metrics import METRICS, read_metrics
from tilewright.trainer.record.quantities import duration, gigabytes, percent, short
from tilewright.trainer.record.report_plots import plots
from tilewright.trainer.run_directory import RECIPE, SUMMARY

REPORT = "report.html"
_ENVIRONMENT = "environment.json"
# A run that goes on writes its page at evaluations and checkpoints, where the last time is as long ago.
SECONDS_BETWEEN_PAGES = 120.0
_SECONDS_BETWEEN_READINGS = 30
_RECENT = 50  # steps, which say how long one takes now


def write_report(run_directory: Path, *, running: bool = False) -> Path:
    """Write the report of a run from what its directory holds, and return its path.

    Reads `recipe.yaml`, `environment.json`, `metrics.jsonl` and `summary.json`. Any of them may be missing or damaged,
    as in a run that was interrupted: the page then says so.

    Args:
        running: the run goes on, and the page will be written again: a browser reads it every half minute.

    Raises:
        TrainingError: there is no such directory, or the report cannot be written.
    """
    if not run_directory.is_dir():
        raise TrainingError(f"there is no run directory {run_directory}; name one that a training run made")
    path = run_directory / REPORT
    page.write(path, _page(_Run(run_directory, running=running)))
    return path


class _Run:
    """What a run directory holds, and what it lacks."""

    def __init__(self, folder: Path, *, running: bool) -> None:
        self.lacks: list[str] = []
        self.running = running
        self.time = datetime.now(UTC)
        self.summary = self._mapping(folder / SUMMARY)
        self.environment = self._mapping(folder / _ENVIRONMENT)
        self.recipe = self._text(folder / RECIPE)
        self.norms = GradNorms()
        self.training: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.last_recorded: datetime | None = None
        try:
            self.last_recorded = _changed(folder / METRICS)
            self.training, self.evaluations = read_metrics(folder / METRICS, lighten=self.norms.take)
        except TrainingError:
            self.lacks.append(METRICS)
        self.name = str(self.summary.get("name") or folder.resolve().name)
        heldout = self.summary.get("heldout")
        self.heldout: dict[str, Any] = heldout if isinstance(heldout, dict) else {}
        compressors = {"gzip -9": "gzip_bits_per_byte", "xz -9": "xz_bits_per_byte"}
        levels = {name: _number(self.heldout, key) for name, key in compressors.items()}
        self.compressors = {name: level for name, level in levels.items() if level is not None}

    def recorded(self, key: str, *, of_timed: bool = False) -> list[float]:
        """One field of every training line that has it; `of_timed`: of those that no profiler slowed down."""
        numbers = (_number(line, key) for line in self.training if not (of_timed and line.get("profiled")))
        return [number for number in numbers if number is not None]

    def last(self, key: str) -> float | None:
        """One figure as the summary has it, else the last training line."""
        recorded = self.recorded({"steps": "step"}.get(key, key))
        of_summary = _number(self.summary, key)
        return of_summary if of_summary is not None else recorded[-1] if recorded else None

    def planned_steps(self) -> int | None:
        """The steps that the recipe wants."""
        return self._positive("steps")

    def seconds_per_step(self) -> float | None:
        """What one took lately, evaluations and checkpoints apart."""
        lines = [
            (tokens, rate)
            for line in self.training[-_RECENT:]
            if (tokens := _number(line, "tokens")) and (rate := _number(line, "tokens_per_second"))
        ]
        took = [(tokens - before) / rate for (before, _), (tokens, rate) in pairwise(lines)]
        return statistics.median(took) if took else None

    def next_page(self) -> datetime | None:
        """When a run that goes on writes its page again, by the pace of its steps; None where that is not known."""
        every = [n for key in ("evaluation", "checkpoints") if (n := self._positive(key, "every"))]
        seconds = self.seconds_per_step()
        if not every or not seconds:
            return None
        between = min(every) * seconds
        return self.time + timedelta(seconds=between * math.ceil(SECONDS_BETWEEN_PAGES / between))

    def _positive(self, *keys: str) -> int | None:
        """A number of the recipe, where it is one above 0."""
        try:
            value = yaml.safe_load(self.recipe or "")
        except (yaml.YAMLError, ValueError):
            return None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, int) and value > 0 else None

    def bits_per_byte(self) -> float | None:
        """Of the held-out text, as the summary has it, else of the last evaluation's first set."""
        if (known := _number(self.heldout, "bits_per_byte")) is not None or not self.evaluations:
            return known
        return _number(next(iter(self.evaluations[-1]["eval"].values()), {}), "bits_per_byte")

    def _mapping(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            self.lacks.append(path.name)
            return {}
        return value

    def _text(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            self.lacks.append(path.name)
            return None


def _page(run: _Run) -> str:
    return page.document(
        run.name,
        (
            _header(run),
            page.cards(_headlines(run)),
            _plots(run),
            _sample(run),
            _recipe(run),
            page.environment(run.environment),
            _DEFINITIONS,
        ),
        refresh=_SECONDS_BETWEEN_READINGS if run.running else 0,
    )


def _header(run: _Run) -> str:
    status = "running" if run.running else str(run.summary.get("status") or "not finished")
    kind = {"finished": "done", "running": "running"}.get(status, "open")
    machine = run.environment.get("gpus") or run.environment.get("cpu")
    first = machine[0] if isinstance(machine, list) else machine
    model = first.get("name") or first.get("model") if isinstance(first, dict) else None
    count = f"{len(machine)} of " if isinstance(machine, list) and len(machine) > 1 else ""
    steps, planned = run.last("steps"), run.planned_steps()
    of_all = f" of {planned:,}" if run.running and planned else ""
    facts = [
        f"{steps:,.0f}{of_all} steps" if steps is not None else None,
        f"{count}{model}" if model else None,
        None if run.running else run.environment.get("time"),
    ]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    note = page.progress((steps or 0) / planned) if run.running and planned else ""
    if current := _how_current(run):
        note += f'<p class="soft">{escape(current)}</p>'
    # A run that goes on has no summary yet.
    if lacks := [name for name in run.lacks if not (run.running and name == SUMMARY)]:
        missing = ", ".join(lacks)
        unfinished = " The run has not come to its end: it was interrupted, or is still going on." * (SUMMARY in lacks)
        note += f'<p class="note">Missing or unreadable here: {escape(missing)}.{unfinished}</p>'
    return f"""<header>
<h1>{escape(run.name)} <span class="status {kind}">{escape(status)}</span></h1>
<p class="soft">{line}</p>
{note}
</header>"""


def _how_current(run: _Run) -> str:
    """What tells a run that goes on from one that was killed, of which nothing can be written any more."""
    if run.running:
        following = run.next_page()
        again = f"next around {_utc(following)}" if following else "next at an evaluation or a checkpoint"
        return (
            f"This page was last written at {_utc(run.time)}, {again}. Long after that, the run has ended without "
            "being able to say so, or it stands still."
        )
    if SUMMARY not in run.lacks or run.last_recorded is None:
        return ""
    seconds = run.seconds_per_step()
    pace = f"; a step takes {f'{seconds:.2g} s' if seconds < 10 else duration(seconds)}" if seconds else ""
    ago = duration(max(0.0, (run.time - run.last_recorded).total_seconds()))
    return f"Last recorded at {_utc(run.last_recorded)}, {ago} before this page was written{pace}."


def _utc(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _headlines(run: _Run) -> Iterator[tuple[str, str, str]]:
    """Label, value and remark of each figure that is known."""
    if (bits := run.bits_per_byte()) is not None:
        levels = " · ".join(f"{name}: {level:.3f}" for name, level in run.compressors.items())
        yield "held-out bits per byte", f"{bits:.3f}", levels
    if losses := run.recorded("loss"):
        yield "training loss", f"{losses[-1]:.3f}", f"nats per token, from {losses[0]:.3f}"
    if (parameters := run.last("parameters")) is not None:
        yield "parameters", short(parameters), ""
    if (tokens := run.last("tokens")) is not None:
        yield "tokens trained on", short(tokens), ""
    if (seconds := _number(run.summary, "seconds")) is not None:
        yield "time in steps", duration(seconds), ""
    if rates := run.recorded("tokens_per_second", of_timed=True):
        since = run.recorded("tokens_per_second_since_start")
        overall = f"; {since[-1]:,.0f} with all pauses" if since else ""
        yield "tokens per second", f"{statistics.median(rates):,.0f}", f"median step{overall}"
    if shares := run.recorded("mfu", of_timed=True):
        peak = _number(run.summary, "matmul_peak_flops")
        remark = f"of {peak / 1e12:,.2f} TFLOP/s" if peak else "median step"
        again = run.recorded("hfu", of_timed=True)
        if again and again != shares:
            remark += f" · HFU {percent(statistics.median(again))}"
        yield "MFU", percent(statistics.median(shares)), remark
    if memory := run.recorded("peak_memory_bytes"):
        yield "peak memory", gigabytes(max(memory)), ""


def _plots(run: _Run) -> str:
    drawn = plots(run.training, run.evaluations, run.compressors, run.norms)
    if not drawn:
        return '<p class="note">No step has been recorded, so there is nothing to plot.</p>'
    return page.plots(drawn)


def _sample(run: _Run) -> str:
    sample = run.summary.get("sample")
    if not isinstance(sample, dict) or not sample.get("continuation"):
        return ""
    prompt, continuation = (escape(str(sample.get(key, ""))) for key in ("prompt", "continuation"))
    return f"""<section>
<h2>A continuation</h2>
<p class="soft">The prompt in bold, then what the trained model made of it.</p>
<pre class="card wrap"><b>{prompt}</b>{continuation}</pre>
</section>"""


def _recipe(run: _Run) -> str:
    if run.recipe is None:
        return ""
    return f'<section>\n<h2>Recipe</h2>\n<pre class="card">{escape(run.recipe)}</pre>\n</section>'


def _changed(path: Path) -> datetime | None:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.is_file() else None


def _number(fields: Mapping[str, Any], key: str) -> float | None:
    value = fields.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


_DEFINITIONS = """<footer class="soft">
<h2>What the figures mean</h2>
<p><b>Bits per byte</b>: the model's loss on held-out text, in bits, over the bytes of that text. It does not depend on
the tokenizer, so a compressor compares: its figure is 8 &times; compressed size &divide; size of the same text.</p>
<p><b>MFU</b> (model FLOPs utilisation): achieved FLOP/s over the matmul peak measured on this machine at the start of
the run. A token counts as 6 &times; parameters in matrix products + 12 &times; layers &times; heads &times; head_dim
&times; sequence_length FLOPs; what is computed twice to save memory counts once.</p>
<p><b>HFU</b> (hardware FLOPs utilisation): the same, with what activation checkpointing computes
twice counted twice.</p>
<p><b>Tokens per second with all pauses</b>: tokens trained on over the time since the run first began, with start-up,
evaluations, checkpoints, steps that were lost and taken again, and the time between a stop and the next start.</p>
<p><b>Peak memory</b>: on a GPU the most that tensors held at once on the first process's device; on a CPU the most
resident memory of the first process, with Python and its libraries. <b>Activations</b>: what the forward pass of a
micro-batch leaves allocated for its backward pass; <b>whole weights</b>: what is gathered of the shards then.</p>
</footer>"""
