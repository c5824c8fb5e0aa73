"""Which launch configuration is fastest on the GPU that is here: what is timed, and the table that follows.

Each configuration that a kernel's table offers is timed at the audit's shapes, through the op itself: the pass or
passes in which the kernel is launched. The table's rows, chosen from the audit, part the sizes into classes; the sizes
timed within a class part it further, and a class without any keeps its row.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tilewright.benchmarks import measure, peaks
from tilewright.benchmarks.kernels.contest import Step
from tilewright.benchmarks.kernels.shapes import drawn
from tilewright.kernels.ahead_of_time import launches_of
from tilewright.kernels.dispatch import use
from tilewright.kernels.launch import FORMAT, Configuration, LaunchTable, measured_rows
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.run_directory import write_atomically

# A choice from the audit stands unless another is faster by more than noise.
_NOISE = 0.02
_MOST_COPIES = 8
_SECONDS_A_CASE = 1.0

# A table's configurations by their number among its choices.
Choices = dict[int, Configuration]
# Seconds of every round by a configuration's number, and why others did not run.
Times = tuple[dict[int, list[float]], dict[int, str]]
Timer = Callable[["Case", Choices], Times]


@dataclass(frozen=True)
class Case:
    """A call whose launch a table decides: `what` of its passes (forward, backward or both) is timed."""

    spec: OpSpec
    label: str
    table: LaunchTable
    size: int
    what: str

    def sample(self) -> Sample:
        """The audit's, in memory that is not touched."""
        return next(s for s in self.spec.audit_samples(torch.bfloat16, False) if s.label == self.label)

    def __str__(self) -> str:
        return f"{self.table.name}, size {self.size:,}: {self.spec.name} {self.label}, {self.what}"


def cases(specs: Sequence[OpSpec], chip: int) -> Iterator[Case]:
    """Every call at the audit's shapes for which a table is asked; nothing is run."""
    for spec in specs:
        tables = {id(table): table for table in spec.tables.values()}
        for sample in spec.audit_samples(torch.bfloat16, False):
            passes: dict[tuple[int, int], set[bool]] = {}
            for table, size, backward in _picks(spec, sample, chip):
                # In steps of 16: rows of 8,191 and of 8,192 differ in alignment, which a table does not know.
                passes.setdefault((id(table), -(-size // 16) * 16), set()).add(backward)
            for (table_id, size), seen in passes.items():
                if table_id in tables:
                    what = "both" if len(seen) == 2 else "backward" if True in seen else "forward"
                    yield Case(spec, sample.label, tables[table_id], size, what)


def _picks(spec: OpSpec, sample: Sample, chip: int) -> list[tuple[LaunchTable, int, bool]]:
    """Which tables are asked for which sizes, and whether in the backward pass."""
    asked: list[tuple[LaunchTable, int, bool]] = []
    pick = LaunchTable.pick

    def recorded(self: LaunchTable, size: int, device: torch.device) -> Configuration:
        asked.append((self, size, torch._C._current_graph_task_id() >= 0))
        return pick(self, size, device)

    with patch.object(LaunchTable, "pick", recorded):
        launches_of(replace(spec, audit_samples=lambda dtype, small: iter([sample])), torch.bfloat16, chip)
    return asked


def times_on(device: torch.device, case: Case, choices: Choices) -> Times:
    """Time the choices in turns, on inputs that the cache does not hold. A `Timer`, given its device."""
    generator = torch.Generator(device).manual_seed(0)
    sample = case.sample()
    size = sum(x.nbytes for x in sample.tensors.values())
    copies = min(_MOST_COPIES, max(1, math.ceil(2 * peaks.cache_bytes(device) / size)))
    samples = [drawn(sample, device, generator) for _ in range(copies)]
    measurements: dict[str, measure.Measurement] = {}
    failures: dict[int, str] = {}
    for number, choice in choices.items():
        steps = [ForcedStep(case, choice, sample) for sample in samples]
        try:
            steps[0].forward()
            if steps[0].backward is not None:
                steps[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # out of shared memory or registers, for the most part
            failures[number] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        measurements[str(number)] = measure.of_passes(steps, device)[0]
    rounds = measure.in_rounds(measurements, seconds=_SECONDS_A_CASE)
    return {int(number): taken[case.what] for number, taken in rounds.items()}, failures


class ForcedStep:
    """A step whose launches are one configuration's, also where it is run later."""

    def __init__(self, case: Case, choice: Configuration, sample: Sample) -> None:
        self._table, self._choice = case.table, choice
        self._step = Step(case.spec, case.spec.function, sample)
        self.backward = self._backward if self._step.backward is not None else None

    def forward(self) -> None:
        """The forward pass."""
        with use("triton"), self._table.force(self._choice):  # also where flash-attn would serve
            self._step.forward()

    def _backward(self) -> None:
        assert self._step.backward is not None
        with use("triton"), self._table.force(self._choice):
            self._step.backward()


@dataclass
class Tuning:
    """What was timed: geometric means over the cases of a table and size, in seconds by the choice's number.

    `record` holds every case's medians and intervals, `dropped` the configurations that did not run, by name.
    """

    seconds: dict[str, dict[int, dict[int, float]]]
    record: list[dict[str, Any]]
    dropped: list[str]


def tune(todo: Iterable[Case], timer: Timer, refused: Mapping[str, set[int]]) -> Tuning:
    """Time every case.

    Args:
        timer: what takes the times.
        refused: by a table's name, the numbers of choices that must not be timed, such as wrong ones.
    """
    tuning = Tuning({}, [], [])
    medians: dict[tuple[str, int], list[dict[int, float]]] = {}
    for case in todo:
        choices = {
            number: choice
            for number, choice in enumerate(case.table.choices())
            if case.size <= choice.up_to and number not in refused.get(case.table.name, ())
        }
        times, failures = timer(case, choices)
        tuning.dropped += [f"{case}: {choices[number]}: {reason}" for number, reason in failures.items()]
        tuning.record += [_recorded(case, choices[number], seconds) for number, seconds in times.items()]
        taken = {number: measure.median_interval(seconds).median for number, seconds in times.items()}
        medians.setdefault((case.table.name, case.size), []).append(taken)
    for (name, size), each in medians.items():
        ran = set.intersection(*(set(taken) for taken in each))
        means = {number: math.exp(sum(math.log(taken[number]) for taken in each) / len(each)) for number in sorted(ran)}
        tuning.seconds.setdefault(name, {})[size] = means
    return tuning


def _recorded(case: Case, choice: Configuration, seconds: list[float]) -> dict[str, Any]:
    median, low, high = measure.median_interval(seconds)
    return {
        "table": case.table.name,
        "size": case.size,
        "op": case.spec.name,
        "sample": case.label,
        "pass": case.what,
        "configuration": str(choice),
        "median_seconds": median,
        "interval_seconds": [low, high],
        "rounds": len(seconds),
    }


def rows(table: LaunchTable, chip: int, seconds: Mapping[int, Mapping[int, float]]) -> list[dict[str, Any]]:
    """The table's rows, for its file: those chosen from the audit, parted at the sizes that were timed.

    Args:
        seconds: by size, by the choice's number.
    """
    choices = table.choices()
    found: list[dict[str, Any]] = []
    after = -1
    for audited in table.audited_rows(chip):
        sizes = sorted(size for size in seconds if after < size <= audited.up_to and seconds[size])
        for size in sizes:
            number = _fastest(choices, audited, seconds[size])
            up_to = min(audited.up_to, choices[number].up_to) if size == sizes[-1] else size
            _append(found, choices[number], up_to, {str(size): round(1e6 * seconds[size][number], 2)})
        if not sizes or found[-1]["up_to"] < audited.up_to:
            _append(found, audited, audited.up_to, {})
        after = audited.up_to
    return found


def _fastest(choices: Sequence[Configuration], audited: Configuration, seconds: Mapping[int, float]) -> int:
    """The number of the fastest choice; the audited one's where that is as fast but for noise."""
    fastest = min(seconds, key=lambda number: seconds[number])
    for number, taken in seconds.items():
        if choices[number].launches_like(audited) and taken <= (1 + _NOISE) * seconds[fastest]:
            return number
    return fastest


def _append(found: list[dict[str, Any]], choice: Configuration, up_to: int, measured_at: dict[str, float]) -> None:
    row = {
        "up_to": up_to,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
        "blocks": choice.blocks,
        "measured_at": measured_at,  # microseconds by size; none where the audit's choice stands
    }
    alike = ("num_warps", "num_stages", "blocks")
    if found and bool(found[-1]["measured_at"]) == bool(measured_at) and all(found[-1][k] == row[k] for k in alike):
        found[-1]["up_to"] = up_to
        found[-1]["measured_at"] |= measured_at
    else:
        found.append(row)


def source_of(environment: Mapping[str, Any]) -> str:
    """What the rows say of where they come from."""
    gpu, versions, git = environment["gpus"][0]["name"], environment["versions"], environment["git"]
    commit = f", commit {git['commit'][:10]}{', with changes' if git['dirty'] else ''}" if git else ""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"measured on {gpu}, torch {versions['torch']}, triton {versions['triton']}{commit}, {today}"


def write(path: Path, chip: int, tables: Sequence[LaunchTable], tuning: Tuning, source: str) -> None:
    """Write the rows of the tables that were timed to the file of generation `chip`; others stay as they are there.

    Raises:
        TrainingError: the file that is there is none of these.
    """
    document: dict[str, Any] = {"format": FORMAT, "chip": chip, "tables": {}}
    if path.exists():
        try:
            document["tables"] = dict(json.loads(path.read_text(encoding="utf-8"))["tables"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is no file of launch tables: delete it, or name another") from error
    for table in tables:
        if table.name in tuning.seconds:
            document["tables"][table.name] = {"source": source, "rows": rows(table, chip, tuning.seconds[table.name])}
            measured_rows(table, chip, document)  # raises for what the kernels would refuse
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
