"""``tilewright benchmark tune``: check every launch configuration on this GPU, time it, and write the launch tables."""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.clone import load_benchmarks
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tilewright.benchmarks.gpu_check import Finding
    from tilewright.benchmarks.tuning import Tuning
    from tilewright.kernels.opspec import OpSpec

_DESCRIPTION = """\
For whoever has an A100, H100 or newer. First each op is checked on this GPU against float64: float32, float16 and
bfloat16, with every launch configuration. Then the configurations are timed in turns at the shapes of real models, and
the fastest become the launch table of this GPU's generation, kernels/tables/sm_XX.json, which ships with the package.
A configuration that is wrong or does not run is left out by name; the status is 1 if it is one in use.
"""

_EPILOG = """\
examples:
  tilewright benchmark tune --record tune.json
  tilewright benchmark tune rms_norm attention      the tables of two ops; the others stay
  tilewright benchmark tune --check-only            check, time nothing
  tilewright benchmark tune --dry-run               list what would be timed; needs no GPU
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "tune",
        help="check and time every launch configuration on this GPU, and write its launch tables",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops (all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check-only", action="store_true", help="check the configurations, and time none")
    how.add_argument("--dry-run", action="store_true", help="list what would be timed, on any machine")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the launch tables (those of the package)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write everything found there, as JSON")
    parser.add_argument(
        "--processes", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="checks at a time (%(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    load_benchmarks()
    console = Console(highlight=False, markup=False)
    specs = _specs(arguments.ops)
    if arguments.processes < 1:
        raise TrainingError(f"--processes is {arguments.processes}; it must be 1 or more")
    for file in (arguments.output, arguments.record):
        if file is not None and not file.absolute().parent.is_dir():
            raise TrainingError(f"the folder of {file} does not exist; make it first")
    if arguments.dry_run:
        return _list(console, specs)
    if not torch.cuda.is_available():
        raise TrainingError(
            "tuning checks and times kernels on an NVIDIA GPU, and torch sees none here; "
            "`tilewright benchmark tune --dry-run` lists what would be timed"
        )
    return _tune(console, specs, arguments)


def _specs(names: Sequence[str]) -> list[OpSpec]:
    from tilewright.kernels.registry import SPECS

    known = {spec.name: spec for spec in SPECS}
    for name in names:
        if name not in known:
            raise TrainingError(f"there is no op {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(SPECS)


def _list(console: Console, specs: Sequence[OpSpec]) -> int:
    """One line for each table and size: how many configurations, and how many calls of each op are timed with each."""
    import torch
    from rich.table import Table

    from tilewright.benchmarks import tuning
    from tilewright.kernels.launch import generation

    chip = generation(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    choices: dict[tuple[str, int], int] = {}
    calls: dict[tuple[str, int], Counter[str]] = {}
    with console.status("following the launches of every op"):
        for case in tuning.cases(specs, chip):
            key = case.table.name, case.size
            choices[key] = sum(case.size <= choice.up_to for choice in case.table.choices())
            calls.setdefault(key, Counter())[f"{case.spec.name}, {case.what}"] += 1
    shown = Table("table", "size", "configurations", "calls timed", title=f"what would be timed on sm_{chip}")
    for name, size in sorted(calls):
        each = "; ".join(f"{call}: {count}" for call, count in calls[name, size].items())
        shown.add_row(name, f"{size:,}", str(choices[name, size]), each)
    console.print(shown)
    return 0


def _tune(console: Console, specs: Sequence[OpSpec], arguments: argparse.Namespace) -> int:
    import torch

    from tilewright.benchmarks import record, tuning
    from tilewright.kernels.launch import TABLES, generation

    device = torch.device("cuda", torch.cuda.current_device())
    chip = generation(device)
    kept: dict[str, Any] = {"format": 1, "environment": record.environment(device), "chip": chip}
    findings = _check(console, specs, device, arguments.processes)
    kept["check"] = [{**vars(finding), "job": finding.job.launched, "op": finding.job.op} for finding in findings]
    _keep(arguments.record, kept)
    wrong = [finding for finding in findings if finding.failure and not finding.job.kernel]
    if wrong or arguments.check_only:
        if wrong:
            console.print("What is launched here today fails, so nothing is timed: report the record.")
        return 1 if wrong else 0

    refused: dict[str, set[int]] = {}
    for finding in findings:
        if finding.failure:
            table = finding.job.spec.tables[finding.job.kernel]
            refused.setdefault(table.name, set()).add(finding.job.number)
    found = _time(console, specs, device, refused)
    kept |= {"timings": found.record, "dropped": found.dropped}
    _keep(arguments.record, kept)
    for reason in found.dropped:
        console.print(f"not timed: {reason}", soft_wrap=True)
    output = arguments.output or TABLES / f"sm_{chip}.json"
    tables = {table.name: table for spec in specs for table in spec.tables.values()}
    tuning.write(output, chip, list(tables.values()), found, tuning.source_of(kept["environment"]))
    kept["tables"] = json.loads(output.read_text(encoding="utf-8"))
    _keep(arguments.record, kept)
    console.print(f"launch tables: {output}", soft_wrap=True)
    return 0


def _check(console: Console, specs: Sequence[OpSpec], device: torch.device, processes: int) -> list[Finding]:
    """Check every configuration, in the order of the ops, and show the worst errors and every failure by name."""
    from rich.progress import track

    from tilewright.benchmarks import gpu_check

    todo = gpu_check.jobs([spec.name for spec in specs])
    each = track(gpu_check.check(todo, device, processes), "checking", total=len(todo), console=console)
    findings = [finding for job in each for finding in job]
    console.print(gpu_check.table_of(findings))
    for finding in findings:
        if finding.failure:
            job = finding.job
            console.print(f"FAILED {job.op}, {job.launched}, {finding.dtype}: {finding.failure}", soft_wrap=True)
    return findings


def _time(console: Console, specs: Sequence[OpSpec], device: torch.device, refused: dict[str, set[int]]) -> Tuning:
    from rich.progress import track

    from tilewright.benchmarks import tuning
    from tilewright.kernels.launch import generation

    with console.status("following the launches of every op"):
        todo = list(tuning.cases(specs, generation(device)))
    timer = functools.partial(tuning.times_on, device)
    return tuning.tune(track(todo, "timing", console=console), timer, refused)


def _keep(file: Path | None, kept: dict[str, Any]) -> None:
    """Write what has been found so far, so that a run that breaks off leaves it."""
    from tilewright.trainer.run_directory import write_atomically

    if file is not None:
        write_atomically(file, json.dumps(kept, indent=1))
