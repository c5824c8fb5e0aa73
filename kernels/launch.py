"""Launch configurations: block sizes, warps and stages, read from a table per GPU generation.

There is no autotuning at run time: ranks that choose apart compute apart, or wait for each other for ever. A row of
the table is chosen by the generation and by one size (a row width, a head dimension): the first row that covers it.

An op states the rows that were chosen from the audit, and further candidates. Where ``tables/sm_90.json`` lies beside
this file, written by ``tilewright benchmark tune`` on a GPU of that generation, its rows hold there instead. They are
candidates too: no configuration is launched that the tests have not run.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent / "tables"
FORMAT = 1
AUDIT = "chosen from the audit of the compiled code, not yet timed on a GPU"


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched for sizes up to `up_to`.

    `blocks` holds the kernel's block sizes by their constexpr names. A block size of 0 stands for "the size itself,
    rounded up to a power of two". `source` says where the choice comes from: the audit, or a measurement.
    """

    up_to: int
    num_warps: int
    blocks: dict[str, int] = field(default_factory=dict)
    num_stages: int = 1
    source: str = field(default=AUDIT, compare=False)

    def launches_like(self, other: Configuration) -> bool:
        """Whether the two differ at most in the sizes that they are meant for."""
        return (self.num_warps, self.num_stages, self.blocks) == (other.num_warps, other.num_stages, other.blocks)

    def __str__(self) -> str:
        blocks = "".join(f"{name} {size}, " for name, size in self.blocks.items())
        return f"{blocks}num_warps {self.num_warps}, num_stages {self.num_stages}"


class LaunchTable:
    """The configurations of one kernel, per GPU generation (compute capability × 10: 80 for A100, 90 for H100).

    A generation that the table does not name takes the nearest older one, or the oldest. The measured rows of a
    generation, where there are any, hold for that one alone.

    Args:
        name: the table's in the files of measured rows.
        generations: rows in the order of `up_to`, chosen from the audit.
        candidates: further configurations for whoever measures, each for sizes up to its `up_to`.
    """

    def __init__(
        self,
        name: str,
        generations: dict[int, tuple[Configuration, ...]],
        candidates: tuple[Configuration, ...] = (),
    ) -> None:
        self.name = name
        self.generations = generations
        self.candidates = candidates
        self._forced: Configuration | None = None
        # Rows and the sizes up to which they hold, by generation: they are asked for on every launch.
        self._rows: dict[int, tuple[list[int], tuple[Configuration, ...]]] = {}

    def pick(self, size: int, device: torch.device) -> Configuration:
        """The configuration for `size` on `device`.

        Raises:
            ValueError: no configuration covers `size`, or the file of measured rows is damaged.
        """
        if self._forced is not None and size <= self._forced.up_to:
            return self._forced
        chip = generation(device)
        bounds, rows = self._rows.get(chip) or self._remember(chip)
        place = bisect_left(bounds, size)
        if place == len(rows):
            raise ValueError(f"size {size} is past the largest that a launch configuration covers")
        return rows[place]

    def rows(self, chip: int) -> tuple[Configuration, ...]:
        """The rows that hold on one generation.

        Raises:
            ValueError: the file of measured rows is damaged.
        """
        return (self._rows.get(chip) or self._remember(chip))[1]

    def audited_rows(self, chip: int) -> tuple[Configuration, ...]:
        """The rows chosen from the audit, which hold where nothing is measured."""
        older = [known for known in self.generations if known <= chip]
        return self.generations[max(older) if older else min(self.generations)]

    def source(self, chip: int) -> str:
        """Where the rows that hold on one generation come from: the audit, a measurement, or both."""
        return "; ".join(dict.fromkeys(row.source for row in self.rows(chip)))

    def choices(self) -> list[Configuration]:
        """Every configuration that can be chosen on any generation, each once, with the largest size it may serve."""
        found: list[Configuration] = []
        for row in (*(row for rows in self.generations.values() for row in rows), *self.candidates):
            alike = next((place for place, known in enumerate(found) if known.launches_like(row)), None)
            if alike is None:
                found.append(row)
            elif row.up_to > found[alike].up_to:
                found[alike] = row
        return found

    def largest(self) -> int:
        """The largest size that every generation's rows cover."""
        return min(rows[-1].up_to for rows in self.generations.values())

    @contextmanager
    def force(self, configuration: Configuration) -> Iterator[None]:
        """Launch with `configuration`, for the sizes it covers and whatever the device, inside the ``with`` block."""
        self._forced = configuration
        try:
            yield
        finally:
            self._forced = None

    def _remember(self, chip: int) -> tuple[list[int], tuple[Configuration, ...]]:
        path = TABLES / f"sm_{chip}.json"
        try:
            rows = measured_rows(self, chip, _read(path)) or self.audited_rows(chip)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"the launch tables in {path} cannot be used: {reason}; measure them anew with `tilewright benchmark "
                "tune`, or delete the file, and the configurations chosen from the audit serve"
            ) from error
        self._rows[chip] = [row.up_to for row in rows], rows
        return self._rows[chip]


def measured_rows(table: LaunchTable, chip: int, file: Mapping[str, Any] | None) -> tuple[Configuration, ...]:
    """A table's rows in the file of one generation; none where there is no file, or nothing of the table in it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the file is of another generation or format, leaves sizes out,
            names a configuration that is none of the table's choices, or is damaged.
    """
    if file is None:
        return ()
    if (file["format"], file["chip"]) != (FORMAT, chip):
        raise ValueError(f"it is of format {file['format']} for sm_{file['chip']}, not {FORMAT} for sm_{chip}")
    if table.name not in file["tables"]:
        return ()
    measured = file["tables"][table.name]
    rows = tuple(_row(table, row, measured["source"]) for row in measured["rows"])
    bounds = [row.up_to for row in rows]
    if bounds != sorted(set(bounds)) or bounds[-1:] < [table.audited_rows(chip)[-1].up_to]:
        raise ValueError(f"the sizes {bounds} of {table.name!r} do not ascend to the largest that is served")
    return rows


def _row(table: LaunchTable, row: dict[str, Any], source: str) -> Configuration:
    given = Configuration(row["up_to"], row["num_warps"], row["blocks"], row["num_stages"])
    for known in table.choices():
        if known.launches_like(given) and isinstance(given.up_to, int) and given.up_to <= known.up_to:
            return replace(known, up_to=given.up_to, source=source if row["measured_at"] else AUDIT)
    raise ValueError(f"{given} up to {given.up_to} is no configuration that {table.name!r} offers")


@lru_cache
def _read(path: Path) -> Any:
    """What the file of one generation holds, read once for all tables; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


# Streaming multiprocessors by generation: A100, H100 SXM, B200.
PROCESSORS = {80: 108, 90: 132, 100: 148}

_generation_override: int | None = None
_processors_override: int | None = None


@contextmanager
def as_if_on(chip: int, processors: int | None = None) -> Iterator[None]:
    """Choose launches as on another generation (80, 90), to compile for a GPU that this machine does not have.

    Args:
        chip: compute capability × 10.
        processors: how many streaming multiprocessors it has; those of the generation's known GPU where left out.
    """
    global _generation_override, _processors_override
    previous = _generation_override, _processors_override
    _generation_override, _processors_override = chip, processors or PROCESSORS.get(chip, 132)
    try:
        yield
    finally:
        _generation_override, _processors_override = previous


def ahead_of_time() -> bool:
    """Whether launches are being chosen for a GPU that is not there, to be compiled and not run."""
    return _generation_override is not None


def generation(device: torch.device) -> int:
    """Compute capability × 10 of `device`; 90 for a CPU, where only the interpreter runs kernels."""
    if _generation_override is not None:
        return _generation_override
    return _capability(device.index) if device.type == "cuda" else 90


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`: the number of programs that a persistent kernel starts."""
    if _processors_override is not None:
        return _processors_override
    # The interpreter runs programs one after another; a few are enough to exercise the split of the work.
    return _multi_processors(device.index) if device.type == "cuda" else 4


# Asked on every launch, and never different: the driver is asked once.
@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache
def _multi_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
