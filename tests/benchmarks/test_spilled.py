"""Tests for tilewright.benchmarks.audit.spilled: what spilled registers add to the bytes that are issued."""

from __future__ import annotations

from typing import Any

import pytest

from tilewright.benchmarks.audit.chips import CHIPS
from tilewright.benchmarks.audit.spilled import spilled_share, with_spills

PLACE = {"op": "rms_norm", "sample": "65,536 wide 2k", "chip": 90, "pass": "backward"}
# One block of 32 warps to a multiprocessor, whose threads' stacks are 2 KiB: 264 MiB on 132 of them.
SPILLING = {
    "kernel": "rms_norm._backward",
    "num_warps": 32,
    "blocks_per_processor": 1,
    "stack_bytes": 2048,
    "hottest_loop": {"global_bytes": 400, "spilled_bytes": 100},
}
LAUNCH = {**PLACE, "kernel": "spilling", "grid": [132, 2]}


def audit(kernel: dict[str, Any]) -> dict[str, Any]:
    row = {**PLACE, "bytes_issued": 1200, "bytes_compulsory": 1000, "byte_ratio": 1.2}
    return {
        "launches": [LAUNCH],
        "kernels": {"spilling": kernel},
        # The sum over programs spills nothing; its bytes are the tensors' alone.
        "traffic": [{**row, "kernel_bytes": {"_backward": 1000, "_sum_over_programs": 200}}],
    }


def test_what_a_kernel_spills_counts_by_its_share_of_the_hottest_loop() -> None:
    (row,) = with_spills(audit(SPILLING))["traffic"]
    assert row["bytes_spilled"] == 1000 // 4
    assert row["bytes_issued"] == 1200 + 250
    assert row["byte_ratio"] == pytest.approx(1.45)


@pytest.mark.parametrize("changes", [{"hottest_loop": {"global_bytes": 400, "spilled_bytes": 0}}, {"stack_bytes": 64}])
def test_a_kernel_without_spills_or_whose_stacks_fit_the_cache_issues_what_was_counted(changes: dict[str, Any]) -> None:
    (row,) = with_spills(audit({**SPILLING, **changes}))["traffic"]
    assert (row["bytes_spilled"], row["bytes_issued"], row["byte_ratio"]) == (0, 1200, 1.2)


def test_only_the_stacks_of_resident_threads_lie_in_the_cache() -> None:
    stacks_of_a_block = SPILLING["stack_bytes"] * SPILLING["num_warps"] * 32  # type: ignore[operator]
    fit = CHIPS[90].l2_cache // stacks_of_a_block  # type: ignore[operator]
    assert spilled_share(SPILLING, {**LAUNCH, "grid": [fit]}) == 0
    assert spilled_share(SPILLING, {**LAUNCH, "grid": [fit + 1]}) == 0.25
    small = {**SPILLING, "stack_bytes": 2048 * fit // 133}
    assert spilled_share(small, {**LAUNCH, "grid": [10_000]}) == 0, "one block to a multiprocessor is resident"


def test_of_several_launches_of_one_kernel_the_one_that_spills_least_speaks_for_all() -> None:
    found = audit(SPILLING)
    found["launches"].append({**LAUNCH, "kernel": "tight"})
    found["kernels"]["tight"] = {**SPILLING, "hottest_loop": {"global_bytes": 400, "spilled_bytes": 40}}
    assert with_spills(found)["traffic"][0]["bytes_spilled"] == 100
