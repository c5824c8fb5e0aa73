"""The whole audit: both instruments in processes of their own, two at a time, and what follows from the two together.

The result is plain data, as ``tilewright audit --json`` writes it:

- ``format``: 1; ``environment``; ``chips``; ``ops``: for each, ``matmuls``, its matrix products by kernel name;
- ``kernels``: by an id, what the compiler made of each kernel (see `compiled`);
- ``launches``: every launch, with the id of its kernel; ``errors``: those that cannot be compiled, run or counted;
- ``traffic``: what each pass of each sample issues and requires (see `issued`);
- ``floors``: the time that each pass takes at the datasheet's peaks, in microseconds: *predicted*, never measured.

The command adds ``bars``, how each was met, and ``comparison`` with other libraries where it was asked for. A figure
that cannot be had is null, with a ``note``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tilewright.benchmarks.audit.chips import CHIPS
from tilewright.benchmarks.audit.spilled import with_spills
from tilewright.cli.clone import command_of
from tilewright.kernels.opspec import OpSpec, Passes, Work
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record.environment import git_state, package_versions

Audit = dict[str, Any]
Finding = dict[str, Any]

_AT_A_TIME = 2
_SHARES = 3  # of the kernels to compile; more than two, so that neither process waits long for the other at the end


class Task(NamedTuple):
    """One process: what it does, its command line, and whether its kernels are interpreted or compiled."""

    name: str
    command: list[str]
    interpreted: bool


def audit(ops: Sequence[str], chips: Sequence[int], console: Console) -> Audit:
    """Audit the named ops, all where none is named, for the named chips.

    Raises:
        TrainingError: an op or a chip is not known, or a process ends early.
    """
    specs = _specs(ops)
    unknown = [chip for chip in chips if chip not in CHIPS]
    if unknown or not chips:
        known = ", ".join(map(str, CHIPS))
        raise TrainingError(f"--chips {','.join(map(str, unknown))}: no such generation is known; it takes {known}")
    arguments = [spec.name for spec in specs], ["--chips", ",".join(map(str, chips))]
    tasks = [Task("bytes issued", command_of("audit.issued", *arguments[0], *arguments[1]), True)]
    for share in range(_SHARES):
        command = command_of("audit.compiled", *arguments[0], *arguments[1], "--share", f"{share}/{_SHARES}")
        tasks.append(Task(f"compiling {share + 1} of {_SHARES}", command, False))
    found = with_spills(merged(run(tasks, console)))
    return {
        "format": 1,
        "environment": _environment(),
        "chips": list(chips),
        "ops": {spec.name: {"matmuls": dict(spec.matmuls)} for spec in specs},
        **found,
        "floors": list(floors(specs, chips, found)),
    }


def _specs(ops: Sequence[str]) -> list[OpSpec]:
    known = {spec.name: spec for spec in SPECS}
    for name in ops:
        if name not in known:
            raise TrainingError(f"there is no op {name!r}; the audit knows {', '.join(known)}")
    return [spec for spec in SPECS if not ops or spec.name in ops]


def _environment() -> Finding:
    state = git_state(Path(__file__)) or {"commit": None, "dirty": None}
    versions = package_versions()
    return {
        "torch": torch.__version__,
        "triton": versions.get("triton"),
        "python": platform.python_version(),
        "commit": state["commit"],
        "dirty": state["dirty"],
    }


def run(tasks: Sequence[Task], console: Console) -> list[Finding]:
    """What the tasks' processes print, two of them at a time; progress is shown on `console`.

    Raises:
        TrainingError: a process ends early; the others are ended too.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    processes: list[subprocess.Popen[str]] = []
    found: list[Finding] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def carry_out(task: Task) -> list[Finding]:
            bar = bars.add_task(task.name, total=None)
            findings = []
            for finding in _printed(task, processes):
                if "total" in finding:
                    bars.update(bar, total=finding["total"])
                else:
                    findings.append(finding)
                    bars.advance(bar, 1 if "kernel" in finding or "traffic" in finding else 0)
            if not console.is_terminal:
                console.print(f"{task.name}: done", markup=False)
            return findings

        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            try:
                for findings in pool.map(carry_out, tasks):
                    found += findings
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    process.terminate()
                raise
    return found


def _printed(task: Task, processes: list[subprocess.Popen[str]]) -> Iterator[Finding]:
    """The JSON lines of the task's process as they come."""
    # One thread each: two processes share the machine, and neither does arithmetic that more would speed up.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if task.interpreted else "0"}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            task.command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True, encoding="utf-8"
        )
        processes.append(process)
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
        if process.wait() != 0:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines() or [f"it ended with status {process.returncode}"]
            raise TrainingError(f"the audit's process {task.name!r} did not finish: {lines[-1]}")


def merged(findings: Iterable[Finding]) -> Audit:
    """The findings of all processes in one place: ``kernels``, ``launches``, ``traffic`` and ``errors``."""
    kernels: dict[str, Finding] = {}
    launches: list[Finding] = []
    traffic: list[Finding] = []
    errors: list[Finding] = []
    for finding in findings:
        if "kernel" in finding:
            kernels[finding["kernel"]["id"]] = {k: v for k, v in finding["kernel"].items() if k != "id"}
        launches += [finding["launch"]] if "launch" in finding else []
        traffic += finding.get("traffic", [])
        errors += [finding["error"]] if "error" in finding else []
    # Processes end in no fixed order; the same audit reads the same.
    launches.sort(key=lambda row: (row["op"], row["chip"]))
    return {"kernels": dict(sorted(kernels.items())), "launches": launches, "traffic": traffic, "errors": errors}


def floors(specs: Iterable[OpSpec], chips: Iterable[int], found: Audit) -> Iterator[Finding]:
    """The predicted time of each pass at the real size: of the bytes that it issues at the datasheet's bandwidth, or of
    the operations of its matrix products at the datasheet's peak, whichever is longer.

    An op that multiplies matrices reads its operands again from caches, so of it only the compulsory bytes count. Where
    nothing was counted at a small size, what the op requires stands in for what it issues.
    """
    traffic = {(row["op"], row["sample"], row["chip"], row["pass"]): row for row in found["traffic"]}
    products = _products(found)
    for spec in specs:
        for sample in spec.audit_samples(torch.bfloat16, False):
            passes = spec.work(sample)
            names = ("forward", "backward", "both") if spec.differentiable(sample) else ("forward",)
            for chip in chips:
                for name in names:
                    place = (spec.name, sample.label, chip, name)
                    own = _own(spec, passes, name, products.get(place[:3], {}))
                    row = traffic.get(place, {})
                    byte_ratio = None if spec.matmuls else row.get("byte_ratio")
                    work = Work(own.flops * (row.get("flop_ratio") or 1), own.bytes * (byte_ratio or 1))
                    seconds = {
                        "memory": work.bytes / CHIPS[chip].peak_bandwidth,
                        "compute": work.flops / CHIPS[chip].peak_flops,
                    }
                    bound = max(seconds, key=lambda kind: seconds[kind])
                    where = dict(zip(("op", "sample", "chip", "pass"), place, strict=True))
                    yield {**where, "predicted_microseconds": round(seconds[bound] * 1e6, 3), "bound": bound}


def _products(found: Audit) -> dict[tuple[str, str, int], dict[str, list[str]]]:
    """The kernels that each sample launches, by pass."""
    names: dict[tuple[str, str, int], dict[str, list[str]]] = {}
    for launch in found["launches"]:
        kernel = found["kernels"][launch["kernel"]]["kernel"].rpartition(".")[2]
        place = names.setdefault((launch["op"], launch["sample"], launch["chip"]), {"both": []})
        place.setdefault(launch["pass"], []).append(kernel)
        place["both"].append(kernel)
    return names


def _own(spec: OpSpec, passes: Passes, name: str, kernels: dict[str, list[str]]) -> Work:
    """The work of a pass, with all matrix products of its own kernels where it computes some of them twice."""
    work: Work = getattr(passes, name)
    counts = {part: sum(spec.matmuls.get(kernel, 0) for kernel in kernels.get(part, [])) for part in ("forward", name)}
    if not counts["forward"] or not counts[name]:
        return work
    return Work(passes.forward.flops * counts[name] // counts["forward"], work.bytes)
