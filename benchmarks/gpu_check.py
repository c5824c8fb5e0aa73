"""Every op on the GPU that is here, in every dtype and with every launch configuration, against float64.

The tests run Triton's interpreter, where nothing races, nothing lacks registers or shared memory, and there are no
matrix products in bfloat16. Each configuration is checked in a process of its own: what one of them breaks (an error of
the GPU outlives its cause) leaves the others alone, and several compile at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from tilewright.cli.clone import command_of
from tilewright.kernels import accuracy
from tilewright.kernels.accuracy import Comparison
from tilewright.kernels.dispatch import INTERPRETED, use
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS

DTYPES = ("float32", "float16", "bfloat16")
# Triton's interpreter holds bfloat16 as its bits, which a matrix product there would multiply as integers.
_NEEDS_A_GPU_FOR_BFLOAT16 = ("attention",)
_SECONDS_A_PROCESS = 3600


@dataclass(frozen=True)
class Job:
    """An op with what its tables choose (`kernel` is empty), or with one configuration of one kernel's table."""

    op: str
    kernel: str = ""
    number: int = 0

    @property
    def spec(self) -> OpSpec:
        """The op's."""
        return next(spec for spec in SPECS if spec.name == self.op)

    @property
    def launched(self) -> str:
        """Which configuration it is about, in words."""
        if not self.kernel:
            return "as chosen"
        return f"{self.kernel}: {self.spec.tables[self.kernel].choices()[self.number]}"


@dataclass(frozen=True)
class Finding:
    """What came of a job in one dtype.

    Attributes:
        error_ratio: the largest error ÷ the largest accepted; None where numbers are missing.
        worst: the sample, and the output or gradient, with that error.
        failure: what is wrong, or empty.
    """

    job: Job
    dtype: str
    error_ratio: float | None = None
    worst: str = ""
    failure: str = ""


def jobs(ops: Sequence[str]) -> list[Job]:
    """What there is to check of the ops: each as chosen, then each configuration of each table."""
    found = [Job(op) for op in ops]
    for job in list(found):
        for kernel, table in job.spec.tables.items():
            found.extend(Job(job.op, kernel, number) for number in range(len(table.choices())))
    return found


def check(todo: Sequence[Job], device: torch.device, processes: int) -> Iterator[list[Finding]]:
    """The findings of each job, in order; `processes` work at a time."""
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(lambda job: _in_a_process(job, device), todo)


def _in_a_process(job: Job, device: torch.device) -> list[Finding]:
    command = command_of("gpu_check", job.op, job.kernel, str(job.number), str(device))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_A_PROCESS, check=False)
    except subprocess.TimeoutExpired:
        return [Finding(job, "any", failure=f"not done after {_SECONDS_A_PROCESS} seconds")]
    findings = [Finding(job, **json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode:
        said = (done.stderr.strip() or "nothing said").splitlines()[-1]
        findings.append(Finding(job, "any", failure=f"its process ended with status {done.returncode}: {said}"))
    return findings


def main() -> None:
    """Check one job, named on the command line; a line of JSON for each dtype."""
    op, kernel, number, device = sys.argv[1:]
    warnings.simplefilter("ignore")
    # Uninitialised memory starts as NaN, so that an element which no kernel writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for finding in findings_of(Job(op, kernel, int(number)), torch.device(device)):
        fields = asdict(finding)
        del fields["job"]
        print(json.dumps(fields), flush=True)


def findings_of(job: Job, device: torch.device) -> Iterator[Finding]:
    """Check `job` on all samples, in this process; a finding for each dtype, none after one that raises."""
    spec = job.spec
    table = spec.tables[job.kernel] if job.kernel else None
    forced = table.force(table.choices()[job.number]) if table is not None else contextlib.nullcontext()
    with use("triton"), forced:
        for name in DTYPES:
            if INTERPRETED and name == "bfloat16" and spec.name in _NEEDS_A_GPU_FOR_BFLOAT16:
                continue
            finding, raised = _in_dtype(job, name, device)
            yield finding
            if raised:
                return


def _in_dtype(job: Job, name: str, device: torch.device) -> tuple[Finding, bool]:
    dtype: torch.dtype = getattr(torch, name)
    ratio, worst, wrong = 0.0, "", []
    torch.manual_seed(0)
    for sample in job.spec.samples(device, dtype):
        try:
            for comparison in accuracy.compare(job.spec, sample, dtype):
                found = error_ratio(comparison, job.spec.tolerance)
                if not found <= 1:
                    wrong.append(f"{sample.label}, {comparison.what}")
                if not found <= ratio:
                    ratio, worst = found, f"{sample.label}, {comparison.what}"
            if not repeatable(job.spec, sample, dtype):
                wrong.append(f"{sample.label}, two runs differ")
        except Exception as error:  # of many kinds: out of resources, an illegal access, a compiler that gives up
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Finding(job, name, failure=f"{sample.label}: {reason}"), True
    known = ratio if math.isfinite(ratio) else None
    return Finding(job, name, known, worst, f"wrong: {'; '.join(wrong)}" if wrong else ""), False


def error_ratio(comparison: Comparison, tolerance: float) -> float:
    """The error ÷ the largest that the contract accepts; infinite where a number is missing or is none."""
    ours, exact = comparison.ours, comparison.exact
    if ours.shape != exact.shape or ours.isnan().any() or not torch.equal(ours.isinf(), exact.isinf()):
        return math.inf
    return comparison.error / comparison.allowed(tolerance) if comparison.error else 0.0


def repeatable(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> bool:
    """Whether two runs of the op agree to the bit."""
    first = accuracy.run(spec.function, spec, sample, dtype)
    second = accuracy.run(spec.function, spec, sample, dtype, first.upstream)
    pairs = [*zip(first.outputs, second.outputs, strict=True)]
    pairs += [(first.gradients[name], second.gradients[name]) for name in first.gradients]
    return all(torch.equal(a, b) for a, b in pairs)


def table_of(findings: Sequence[Finding]) -> Table:
    """By op and dtype: configurations checked, the worst error, and how many failed."""
    shown = Table("op", "dtype", "configurations", "worst error ÷ accepted", "where", "failed")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.job.op, finding.dtype), []).append(finding)
    for (op, dtype), group in groups.items():
        known = [(finding.error_ratio, finding.worst) for finding in group if finding.error_ratio is not None]
        ratio, where = max(known, default=(math.nan, ""))
        failed = sum(bool(finding.failure) for finding in group)
        shown.add_row(op, dtype, str(len(group)), f"{ratio:.2f}" if known else "none", where, str(failed or ""))
    return shown
