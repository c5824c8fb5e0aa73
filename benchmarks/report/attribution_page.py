"""The page of an attribution: what each kernel buys in a whole training step, in time and in peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from tilewright.benchmarks.attribution import Recorded, Row, variant_name
from tilewright.benchmarks.report.plots import Point, bars_from_one
from tilewright.benchmarks.report.records import device_of, origin
from tilewright.benchmarks.report.tables import Cell, amount, ratio_cell, seconds, section, side_by_side, soft, table
from tilewright.trainer.record import page
from tilewright.trainer.record.plot import Plot

_RATIO = "step without the kernel ÷ step with it"


def write(path: Path, recorded: Recorded) -> None:
    """Write the page.

    Raises:
        TrainingError: it cannot be written there.
    """
    sections = [
        _header(recorded),
        page.cards(_headlines(recorded)),
        _bought(recorded),
        section("Not replaced, or refused", table(("kernel", "replaced by", "why"), _left_out(recorded))),
        section("What the figures mean", table(("figure", "definition"), list(recorded.definitions.items()))),
        page.environment({**recorded.environment, "recipe": recorded.recipe}),
    ]
    page.write(path, page.document(f"What each kernel buys: {device_of(recorded.environment)}", sections))


def _header(recorded: Recorded) -> str:
    recipe, processes = recorded.recipe, recorded.result.processes
    step = (
        f"A training step of {recipe.get('name')}, {'compiled' if recipe.get('compile') else 'eager'}, "
        f"{recipe.get('compute_dtype')}, {processes} process{'es' if processes > 1 else ''}; tokens: "
        f"{recorded.result.tokens}."
    )
    return f"<header>\n<h1>What each kernel buys</h1>\n{soft(origin(recorded.environment))}\n{soft(step)}\n</header>"


def _headlines(recorded: Recorded) -> Iterator[tuple[str, str, str]]:
    result = recorded.result
    median, low, high = result.seconds
    yield "the step as it is", seconds(median), f"95% interval: {seconds(low)} to {seconds(high)}"
    yield "tokens/s", f"{result.tokens_per_step / median:,.0f}", "all processes together"
    yield "peak memory", amount(result.peak_memory_bytes), "of a process, weights and optimizer state included"
    measured = [row for row in result.rows if row.time_ratio is not None]
    bought = sum(row.interval is not None and row.interval[0] > 1 for row in measured)
    yield "replacements that cost time", f"{bought} of {len(measured)}", "by the whole interval"


def _bought(recorded: Recorded) -> str:
    measured = [row for row in recorded.result.rows if _time(row) is not None]
    header = ("kernel", "replaced by", "step without it", "÷ with it", "peak memory without it", "÷ with it")
    rounds = len(next(iter(recorded.result.rounds.values()), []))
    how = (
        "Each kernel in turn is replaced by plain PyTorch: above 1 it buys something. Ratios of times are medians over "
        f"{rounds} interleaved rounds, taken round by round, with the 95% interval of that median; peak memory is "
        "counted and has no interval. Green or red: the whole interval lies on that side."
    )
    return section(
        "The step without each kernel",
        soft(how) if measured else "",
        side_by_side(_plots(measured)),
        table(header, (_table_row(row, recorded.result.rounds) for row in measured)),
    )


def _plots(rows: list[Row]) -> Iterator[Plot]:
    for title, caption, ratio_of in (
        ("Time bought", "The median ratio; line: its 95% interval.", _time),
        ("Peak memory bought", "Most bytes allocated at once.", _memory),
    ):
        ratios = {f"{row.kernel}: {row.replaced_by}": ratio for row in rows if (ratio := ratio_of(row)) is not None}
        if ratios:
            yield bars_from_one(title, caption, ratios, _RATIO)


def _time(row: Row) -> Point | None:
    return None if row.time_ratio is None or row.interval is None else Point(row.time_ratio, *row.interval)


def _memory(row: Row) -> Point | None:
    return None if row.peak_memory_ratio is None else Point(*[row.peak_memory_ratio] * 3)


def _table_row(row: Row, rounds: dict[str, list[float]]) -> list[str | Cell]:
    taken = rounds.get(variant_name(row.kernel, row.replaced_by))
    return [
        row.kernel,
        row.replaced_by,
        Cell(seconds(statistics.median(taken) if taken else None)),
        ratio_cell(_time(row), above_one="better", below_one="worse"),
        Cell(amount(row.peak_memory_bytes)),
        ratio_cell(_memory(row), above_one="better", below_one="worse"),
    ]


def _left_out(recorded: Recorded) -> Iterator[tuple[str, str, str]]:
    return ((row.kernel, row.replaced_by, row.note) for row in recorded.result.rows if row.note)
