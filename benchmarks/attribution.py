"""What each kernel buys in a whole training step: the step with the kernel against the step with plain PyTorch instead.

The trainer's own step (`training/workload.py`) is taken with each kernel in turn replaced (`training/replacements.py`).
First every variant takes one step apart, which compiles it; its loss and gradient norm must be those of the step as it
is, or its time is not taken. Then memory is counted in one more step each. Then come the rounds: each takes every
variant once, in an order drawn anew, so that whatever slows the machine slows all of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from tilewright.benchmarks.allocations import peak_bytes
from tilewright.benchmarks.measure import Interval, interleaved, median_interval, paired_ratio
from tilewright.benchmarks.record import environment
from tilewright.benchmarks.training.replacements import Replacement, replacements
from tilewright.benchmarks.training.workload import Workload, disagreement
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.quantities import gigabytes
from tilewright.trainer.step import StepResult

# Order statistics of fewer rounds give no 95% interval of a median.
FEWEST_ROUNDS = 6
FORMAT = 1
_AS_IT_IS = "the step as it is"

DEFINITIONS = {
    "time_ratio": "seconds of the step with the kernel replaced ÷ seconds of the step as it is, within each round; the "
    "median over the rounds; above 1 the kernel buys time",
    "interval": "the order statistics of the rounds' ratios that hold their median with 95% confidence",
    "peak_memory_ratio": "most bytes allocated at once, weights and optimizer state included, with the kernel replaced "
    "÷ as it is; above 1 the kernel buys memory",
    "step": "forward and backward over all micro-batches, clipping and the optimizer; the learning rate is 0, so every "
    "step is the same step",
}


@dataclass(frozen=True)
class Row:
    """What one kernel buys; figures that could not be had are None, and `note` says why."""

    kernel: str
    replaced_by: str
    time_ratio: float | None = None
    interval: tuple[float, float] | None = None
    peak_memory_ratio: float | None = None
    peak_memory_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Attribution:
    """The step as it is, and a row for each kernel in it.

    Attributes:
        tokens: where the tokens come from, as a phrase.
        tokens_per_step: over all processes.
        processes: that take part in the step.
        seconds: of the step as it is.
        peak_memory_bytes: of the step as it is, a process.
        rounds: seconds of every round, by variant.
    """

    tokens: str
    tokens_per_step: int
    processes: int
    seconds: Interval
    peak_memory_bytes: int
    rows: list[Row]
    rounds: dict[str, list[float]]


@dataclass(frozen=True)
class _Variant:
    """The step as it is (no replacement), or with one."""

    workload: Workload
    replacement: Replacement | None

    def step(self) -> StepResult:
        with self.replacement.within() if self.replacement else contextlib.nullcontext():
            return self.workload.step()


def attribute(workload: Workload, rounds: int, progress: Callable[[str, float], None]) -> Attribution:
    """Measure what each kernel of the workload's step buys.

    Args:
        rounds: how often each variant's step is timed, `FEWEST_ROUNDS` or more.
        progress: told what is going on, and what part of everything is done.

    Raises:
        TrainingError: too few rounds, or the step as it is is not finite.
    """
    check_rounds(rounds)
    replaced, untouched = replacements(workload)
    variants = {_AS_IT_IS: _Variant(workload, None)}
    variants |= {variant_name(r.kernel, r.by): _Variant(workload, r) for r in replaced}
    steps = _counted(progress, len(variants) * (2 + rounds))
    with _compiled_apart(len(variants)):
        refused = _first_steps(variants, workload.recipe.compute_dtype, steps)
        kept = {name: variant for name, variant in variants.items() if name not in refused}
        memory = {name: _peak_memory(variant, steps, name) for name, variant in kept.items()}
        calls = {name: _announced(variant.step, steps, f"timing {name}") for name, variant in kept.items()}
        seconds = interleaved(calls, rounds)
    rows = [
        Row(r.kernel, r.by, note=refused[name])
        if name in refused
        else _row(r, seconds[name], seconds[_AS_IT_IS], memory[name], memory[_AS_IT_IS])
        for name, r in zip(list(variants)[1:], replaced, strict=True)
    ]
    return Attribution(
        workload.tokens,
        workload.recipe.tokens_per_step(),
        workload.world.size,
        median_interval(seconds[_AS_IT_IS]),
        memory[_AS_IT_IS],
        [*rows, *(Row(u.kernel, "", note=u.why) for u in untouched)],
        seconds,
    )


def variant_name(kernel: str, by: str) -> str:
    """The step with `kernel` replaced, as the rounds name it."""
    return f"{kernel} by {by}"


def check_rounds(rounds: int) -> None:
    """Raise for fewer rounds than an interval needs.

    Raises:
        TrainingError: they are.
    """
    if rounds < FEWEST_ROUNDS:
        raise TrainingError(f"--steps is {rounds}; a 95% interval of a median needs {FEWEST_ROUNDS} or more")


class Recorded(NamedTuple):
    """An attribution as a file keeps it: with where it was measured, what each figure means, and the recipe."""

    result: Attribution
    environment: Mapping[str, Any]
    definitions: Mapping[str, str]
    recipe: Mapping[str, Any]


def record(result: Attribution, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The result ready for JSON; `recorded` reads it."""
    where = {"environment": environment(device), "definitions": DEFINITIONS, "recipe": asdict(recipe)}
    return {"format": FORMAT, **where, **asdict(result)}


def is_record(content: Any) -> bool:
    """Whether a JSON file's content is, or was meant to be, an attribution rather than another kind of record."""
    return isinstance(content, dict) and {"rows", "rounds", "recipe"} <= content.keys()


def recorded(content: Mapping[str, Any], path: Path) -> Recorded:
    """What `record` gave, from the content of the JSON file `path`.

    Raises:
        TrainingError: it is of another format, or damaged.
    """
    mend = "measure it anew with `tilewright benchmark attribute`"
    if content.get("format") != FORMAT:
        raise TrainingError(f"{path} holds no attribution of the format known here ({FORMAT}); {mend}")
    try:
        figures = {name: content[name] for name in ("tokens", "tokens_per_step", "processes", "peak_memory_bytes")}
        rows = [Row(**{**row, "interval": row["interval"] and tuple(row["interval"])}) for row in content["rows"]]
        rounds = {name: list(map(float, seconds)) for name, seconds in content["rounds"].items()}
        result = Attribution(**figures, seconds=Interval(*content["seconds"]), rows=rows, rounds=rounds)
        return Recorded(result, *(dict(content[name]) for name in ("environment", "definitions", "recipe")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path} holds an attribution that is damaged ({error!r}); {mend}") from error


def table(result: Attribution, recipe: Recipe, world: World) -> Table:
    """The rows, as a person reads them."""
    step, compiled = result.seconds, "compiled" if recipe.compile else "eager"
    shown = Table(
        title=f"What each kernel buys in a step of {recipe.name}: the step without it ÷ the step with it",
        caption=f"The step as it is: {step.median:.3g} s ({step.low:.3g} to {step.high:.3g}), "
        f"{recipe.tokens_per_step() / step.median:,.0f} tokens/s, at most {gigabytes(result.peak_memory_bytes)} a "
        f"process; {compiled}, {recipe.compute_dtype}, {world.size} process{'es' if world.size > 1 else ''} on "
        f"{world.device.type}; tokens: {result.tokens}.\nMeasured here: medians of {len(result.rounds[_AS_IT_IS])} "
        "interleaved rounds with their 95% intervals. Above 1 the kernel buys something.",
        caption_justify="left",
    )
    shown.add_column("kernel", no_wrap=True)
    shown.add_column("replaced by", overflow="fold")
    shown.add_column("time", justify="right", no_wrap=True)
    shown.add_column("peak memory", justify="right", no_wrap=True)
    for row in result.rows:
        time = "" if row.interval is None else f"{row.time_ratio:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})"
        memory = "" if row.peak_memory_ratio is None else f"{row.peak_memory_ratio:.2f}"
        shown.add_row(row.kernel, "; ".join(filter(None, (row.replaced_by, row.note))), time, memory)
    return shown


def _first_steps(variants: dict[str, _Variant], compute_dtype: str, steps: Callable[[str], None]) -> dict[str, str]:
    """Take each variant's first step; why those that may not be timed are refused."""
    refused: dict[str, str] = {}
    as_it_is: StepResult | None = None
    for name, variant in variants.items():
        steps(f"first step: {name}")
        result = variant.step()
        if as_it_is is None and not result.stepped:
            raise TrainingError(
                f"{name} has loss {result.loss:.6g} and gradient norm {result.grad_norm:.6g}, so nothing can be "
                "compared with it; take a recipe whose first step is finite, such as with compute_dtype bfloat16"
            )
        as_it_is = as_it_is or result
        apart = disagreement(result, as_it_is, compute_dtype)
        if apart:
            refused[name] = apart
    return refused


def _row(
    replacement: Replacement, seconds: list[float], as_it_is: list[float], memory: int, memory_as_it_is: int
) -> Row:
    ratio = paired_ratio(seconds, as_it_is)
    return Row(
        replacement.kernel,
        replacement.by,
        ratio.median,
        (ratio.low, ratio.high),
        memory / memory_as_it_is,
        memory,
    )


def _peak_memory(variant: _Variant, steps: Callable[[str], None], name: str) -> int:
    steps(f"counting memory: {name}")
    return variant.workload.state_bytes() + peak_bytes(variant.step, variant.workload.world.device)


def _announced(step: Callable[[], StepResult], steps: Callable[[str], None], what: str) -> Callable[[], StepResult]:
    def call() -> StepResult:
        steps(what)
        return step()

    return call


def _counted(progress: Callable[[str, float], None], total: int) -> Callable[[str], None]:
    """Tells `progress` what begins and what part of `total` steps is done."""
    done = itertools.count()
    return lambda what: progress(what, next(done) / total)


@contextlib.contextmanager
def _compiled_apart(variants: int) -> Iterator[None]:
    """Let Dynamo keep a compiled block for every variant; its own limit would end in an error at the ninth."""
    before = torch.compiler.config.recompile_limit
    torch.compiler.config.recompile_limit = before + 2 * variants
    try:
        yield
    finally:
        torch.compiler.config.recompile_limit = before
