"""Tests for tilewright.benchmarks.audit.spilled: what spilled registers add to the bytes that are issued."""

from __future__ import annotations

from typing import Any

import pytest

from tilewright.benchmarks.audit.spilled import with_spills

PLACE = {"op": "rms_norm", "sample": "65,536 wide 2k", "chip": 90, "pass": "backward"}
SPILLING = {"kernel": "rms_norm._backward", "hottest_loop": {"global_bytes": 400, "spilled_bytes": 100}}


def audit(kernel: dict[str, Any]) -> dict[str, Any]:
    row = {**PLACE, "bytes_issued": 1200, "bytes_compulsory": 1000, "byte_ratio": 1.2}
    return {
        "launches": [{**PLACE, "kernel": "spilling"}],
        "kernels": {"spilling": kernel},
        # The sum over programs spills nothing; its bytes are the tensors' alone.
        "traffic": [{**row, "kernel_bytes": {"_backward": 1000, "_sum_over_programs": 200}}],
    }


def test_what_a_kernel_spills_counts_by_its_share_of_the_hottest_loop() -> None:
    (row,) = with_spills(audit(SPILLING))["traffic"]
    assert row["bytes_spilled"] == 1000 // 4
    assert row["bytes_issued"] == 1200 + 250
    assert row["byte_ratio"] == pytest.approx(1.45)


def test_a_kernel_without_spills_issues_what_was_counted() -> None:
    (row,) = with_spills(audit({**SPILLING, "hottest_loop": {"global_bytes": 400, "spilled_bytes": 0}}))["traffic"]
    assert (row["bytes_spilled"], row["bytes_issued"], row["byte_ratio"]) == (0, 1200, 1.2)


def test_of_several_launches_of_one_kernel_the_one_that_spills_least_speaks_for_all() -> None:
    found = audit(SPILLING)
    found["launches"].append({**PLACE, "kernel": "tight"})
    found["kernels"]["tight"] = {**SPILLING, "hottest_loop": {"global_bytes": 400, "spilled_bytes": 40}}
    assert with_spills(found)["traffic"][0]["bytes_spilled"] == 100
