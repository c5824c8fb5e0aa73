"""The check of every configuration on a GPU, tried in the interpreter: what is wrong is named, what is right passes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.benchmarks import gpu_check
from tilewright.benchmarks.gpu_check import Finding, Job, check, findings_of, jobs, table_of
from tilewright.kernels import relu2
from tilewright.kernels.launch import LaunchTable
from tilewright.kernels.opspec import Sample
from tilewright.kernels.registry import SPECS

CPU = torch.device("cpu")
RELU2 = next(spec for spec in SPECS if spec.name == "relu2")


def small(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample("a block", {"x": torch.randn(3, 200, device=device).to(dtype)})


def replaced(monkeypatch: pytest.MonkeyPatch, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Stands in for the op, on one small sample."""
    spec = dataclasses.replace(RELU2, function=function, samples=small)
    monkeypatch.setattr(gpu_check, "SPECS", (spec,))


def test_each_op_is_checked_as_chosen_and_with_every_choice_of_every_table() -> None:
    found = jobs(["rms_norm", "linear_kl"])
    assert found[:2] == [Job("rms_norm"), Job("linear_kl")]
    counts = {
        key: len(table.choices()) for spec in SPECS for key, table in spec.tables.items() if spec.name == "rms_norm"
    }
    for kernel, count in counts.items():
        assert [job for job in found if job.op == "rms_norm" and job.kernel == kernel] == [
            Job("rms_norm", kernel, number) for number in range(count)
        ]
    assert found[2].launched.startswith("forward: BLOCK_COLUMNS")


def test_what_is_right_passes_in_every_dtype_with_the_configuration_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replaced(monkeypatch, relu2)
    picked = set()
    pick = LaunchTable.pick

    def recorded(self: LaunchTable, size: int, device: torch.device) -> Any:
        picked.add(str(pick(self, size, device)))
        return pick(self, size, device)

    monkeypatch.setattr(LaunchTable, "pick", recorded)
    number = len(RELU2.tables["elementwise"].choices()) - 1
    found = list(findings_of(Job("relu2", "elementwise", number), CPU))
    assert [(finding.dtype, finding.failure) for finding in found] == [(name, "") for name in gpu_check.DTYPES]
    assert all(finding.error_ratio is not None and finding.error_ratio <= 1 for finding in found)
    assert picked == {str(RELU2.tables["elementwise"].choices()[number])}


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda x: relu2(x) * 1.01)
    (finding, *_) = findings_of(Job("relu2"), CPU)
    assert finding.error_ratio is not None
    assert finding.error_ratio > 100
    assert "a block, output 0" in finding.failure
    assert "a block, gradient of x" in finding.failure


def test_an_element_that_is_not_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda x: relu2(x).index_fill(1, torch.tensor([199]), float("nan")))
    (finding, *_) = findings_of(Job("relu2"), CPU)
    assert finding.error_ratio is None
    assert finding.worst == "a block, output 0"
    assert finding.failure.startswith("wrong: a block, output 0")


def test_a_race_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda x: relu2(x) * (1 + 1e-7 * torch.rand(x.shape)).to(x.dtype))
    (finding, *_) = findings_of(Job("relu2"), CPU)
    assert "a block, two runs differ" in finding.failure


def test_what_raises_is_named_and_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    replaced(monkeypatch, raising)
    (finding,) = findings_of(Job("relu2"), CPU)
    assert finding.failure == "a block: RuntimeError: out of resource: shared memory"


def test_a_process_that_dies_is_a_finding_and_the_others_go_on() -> None:
    gone, done = check([Job("relu2", "no such kernel"), Job("relu2")], CPU, 2)
    (finding,) = gone
    assert finding.failure == "its process ended with status 1: KeyError: 'no such kernel'"
    assert [(finding.dtype, finding.failure) for finding in done] == [(name, "") for name in gpu_check.DTYPES]


def test_the_table_shows_the_worst_and_counts_failures() -> None:
    job = Job("relu2")
    found = [
        Finding(job, "float16", 0.25, "here"),
        Finding(job, "float16", 0.5, "there"),
        Finding(job, "float16", None, "", "wrong: everything"),
    ]
    shown = table_of(found)
    cells = [list(column.cells) for column in shown.columns]
    assert cells == [["relu2"], ["float16"], ["3"], ["0.50"], ["there"], ["1"]]
