"""`report.html`: one page that shows a run and needs nothing but a browser: no network, no scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record import page
from tilewright.trainer.record.metrics import METRICS, read_metrics
from tilewright.trainer.record.quantities import duration, gigabytes, percent, short
from tilewright.trainer.record.report_plots import plots
from tilewright.trainer.run_directory import RECIPE, SUMMARY

REPORT = "report.html"
_ENVIRONMENT = "environment.json"
_SECONDS_BETWEEN_READINGS = 30


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
        self.summary = self._mapping(folder / SUMMARY)
        self.environment = self._mapping(folder / _ENVIRONMENT)
        self.recipe = self._text(folder / RECIPE)
        self.training: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        try:
            self.training, self.evaluations = read_metrics(folder / METRICS)
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
        try:
            recipe = yaml.safe_load(self.recipe or "")
        except (yaml.YAMLError, ValueError):
            return None
        steps = recipe.get("steps") if isinstance(recipe, dict) else None
        return steps if isinstance(steps, int) and steps > 0 else None

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
        f"as of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC" if run.running else run.environment.get("time"),
    ]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    note = page.progress((steps or 0) / planned) if run.running and planned else ""
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
    drawn = plots(run.training, run.evaluations, run.compressors)
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
