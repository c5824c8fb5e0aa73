"""What a benchmark's record file holds: pytest-benchmark's JSON, with our columns in `extra_info`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tilewright.benchmarks.report.plots import Point
from tilewright.trainer.errors import TrainingError

_FORMAT = 1
OURS = "ours"
_OURS_COMPILED, _TORCH_COMPILE = "ours compiled", "torch.compile"
MEND = "give a file that `tilewright benchmark run` wrote"


class Case(NamedTuple):
    """What is measured, whoever provides it."""

    op: str
    shape: str
    dtype: str
    direction: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.op, self.shape, self.dtype, self.direction) if part)


@dataclass(frozen=True)
class Row:
    """One provider's figures for one case.

    Attributes:
        case: the op (or "training step"), its shape, dtype and pass.
        provider: "ours", "ours compiled", or whose implementation it is.
        seconds: the median time with its 95% interval.
        rounds: seconds of each round, in the order in which they were run; empty where they were not kept.
        figures: every other column by its name.
        implementation: which of the provider's implementations ran; empty if it has but one.
        note: what else must be known about it; empty if nothing.
    """

    case: Case
    provider: str
    seconds: Point
    rounds: tuple[float, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    implementation: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is Tilewright that was measured."""
        return self.provider.split(" ")[0] == OURS


class Absence(NamedTuple):
    """Why a provider has no time for an op in a shape and dtype."""

    op: str
    shape: str
    dtype: str
    provider: str
    reason: str


@dataclass(frozen=True)
class Record:
    """A record file.

    Attributes:
        path: the file.
        rows: what was measured.
        environment: where, with the peaks that this device reached.
        definitions: what the derived figures mean.
        refused: what failed, or computed something else, and was not timed.
        left_out: what is not there or lacks something.
        asked: for which suite, and of its kernels for which alone; None where the record does not say.
    """

    path: Path
    rows: tuple[Row, ...]
    environment: Mapping[str, Any]
    definitions: Mapping[str, str]
    refused: tuple[Absence, ...] = ()
    left_out: tuple[Absence, ...] = ()
    asked: tuple[str, tuple[str, ...]] | None = None

    @property
    def device(self) -> str:
        """What the figures were measured on, as a person names it."""
        return device_of(self.environment)

    @property
    def chip(self) -> int | None:
        """The compute capability of the GPU that was measured, as in 90; None on a CPU."""
        capability = re.fullmatch(r"(\d+)\.(\d)", str(_gpu(self.environment).get("capability")))
        return int(capability[1] + capability[2]) if capability else None


def device_of(environment: Mapping[str, Any]) -> str:
    """What was measured on, as a person names it."""
    if gpu := _gpu(environment):
        return str(gpu.get("name") or "a GPU of unknown name")
    return str(_mapping(environment, "cpu").get("model") or "a CPU of unknown model")


def code_of(environment: Mapping[str, Any]) -> str:
    """The commit that was measured, and whether tracked files differed from it."""
    git = environment.get("git")
    if not isinstance(git, dict) or not git.get("commit"):
        return "of no known commit"
    return f"commit {str(git['commit'])[:10]}{', with changes that are not committed' if git.get('dirty') else ''}"


def origin(environment: Mapping[str, Any]) -> str:
    """What was measured on, of which code and when, as one line."""
    facts = [f"measured on {device_of(environment)}", code_of(environment), str(environment.get("time") or "")]
    return " · ".join(filter(None, facts))


def _gpu(environment: Mapping[str, Any]) -> Mapping[str, Any]:
    """The GPU that was measured on; empty where it was a CPU."""
    gpus = environment.get("gpus")
    on_cpu = str(environment.get("device") or "").startswith("cpu")
    return gpus[0] if isinstance(gpus, list) and gpus and isinstance(gpus[0], dict) and not on_cpu else {}


def cases_of(record: Record) -> dict[Case, dict[str, Row]]:
    """The rows of each case by provider, in the record's order."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in record.rows:
        cases.setdefault(row.case, {})[row.provider] = row
    return cases


def rival_of(row: Row, rows: Mapping[str, Row]) -> Row | None:
    """Which row of ours, of all `rows` of the case, `row` is compared with: like with like, compiled with compiled."""
    if row.is_ours:
        return None
    return (rows.get(_OURS_COMPILED) if row.provider == _TORCH_COMPILE else None) or rows.get(OURS)


def read_json(path: Path, mend: str) -> Any:
    """What a JSON file holds.

    Raises:
        TrainingError: it cannot be read or is cut off; the sentence ends with the `mend`.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"could not read {path}: {error.strerror or error}; {mend}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is no whole JSON file ({error}); it may be cut off: {mend}") from error


def read(path: Path) -> Record:
    """Read a record that ``tilewright benchmark run`` wrote.

    Raises:
        TrainingError: it cannot be read, is cut off, or is no such record.
    """
    return parsed(read_json(path, MEND), path)


def parsed(content: Any, path: Path) -> Record:
    """The record that the JSON file `path` with this content is.

    Raises:
        TrainingError: it is no such record.
    """
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    ours = content.get("tilewright_record") if isinstance(content, dict) else None
    if not isinstance(benchmarks, list) or not isinstance(ours, dict) or ours.get("format") != _FORMAT:
        raise TrainingError(f"{path} holds no benchmark record of the format known here ({_FORMAT}); {MEND}")
    rows = tuple(row for entry in benchmarks if (row := _row(entry)) is not None)
    if not rows:
        raise TrainingError(f"{path} holds no row of a benchmark: nothing in it was measured; run the benchmark again")
    return Record(
        path,
        rows,
        environment={**_mapping(ours, "environment"), "peaks": _mapping(ours, "peaks")},
        definitions={str(name): str(text) for name, text in _mapping(ours, "definitions").items()},
        refused=_absences(ours, "refused"),
        left_out=_absences(ours, "left_out"),
        asked=(str(ours["suite"]), tuple(map(str, ours["only"]))) if {"suite", "only"} <= ours.keys() else None,
    )


def _row(entry: Any) -> Row | None:
    info = _mapping(entry, "extra_info")
    provider = info.get("provider")
    op = info.get("op")
    median = info.get("median_seconds")
    if not isinstance(provider, str) or not isinstance(op, str) or not _is_number(median) or median <= 0:
        return None
    shape, dtype, direction = (
        str(next((info[key] for key in keys if info.get(key) is not None), ""))
        for keys in (("sample", "shape"), ("dtype",), ("pass",))
    )
    stats = _mapping(entry, "stats")
    figures = {key: float(value) for key, value in info.items() if _is_number(value)}
    return Row(
        case=Case(op, shape, dtype, direction),
        provider=provider,
        seconds=_with_interval(median, _numbers(info.get("interval_seconds"))),
        rounds=tuple(float(value) for value in _numbers(stats.get("data"))),
        figures=figures,
        implementation=str(info.get("implementation") or ""),
        note=str(info.get("note") or ""),
    )


def _with_interval(median: float, interval: list[float]) -> Point:
    low, high = interval if len(interval) == 2 and interval[0] > 0 else (median, median)
    return Point(median, low, high)


def _absences(ours: Mapping[str, Any], key: str) -> tuple[Absence, ...]:
    listed = ours.get(key)
    names = ("op", "sample", "dtype", "provider", "reason")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return tuple(Absence(*(str(entry.get(name) or "") for name in names)) for entry in entries)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _numbers(values: Any) -> list[float]:
    """A list of numbers, or an empty one for anything else."""
    return [float(value) for value in values] if isinstance(values, list) and all(map(_is_number, values)) else []


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
