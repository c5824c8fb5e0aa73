"""The clone's benchmarks are importable in these tests, and a small audit that clears every bar."""

from typing import Any

import pytest

from tilewright.cli.clone import load_benchmarks

load_benchmarks()


@pytest.fixture
def sound_audit() -> dict[str, Any]:
    """Three ops on one chip, a launch or two of each."""
    compiled = {
        "chip": 90,
        "num_warps": 8,
        "num_stages": 1,
        "constants": {"HEAD_DIM": 128},
        "registers": 64,
        "stack_bytes": 0,
        "spill_loads": 0,
        "spill_stores": 0,
        "shared_bytes": 0,
        "blocks_per_processor": 4,
        "occupancy": 0.5,
        "limited_by": "registers",
        "global_accesses": 4,
        "wide_accesses": 4,
        "tensor_cores": {},
        "hottest_loop": {"instructions": 10, "mix": {"tensor": 0, "memory": 4, "float": 6}},
        "compile_seconds": 1.0,
    }
    kernels = {
        "norm": {**compiled, "kernel": "rms_norm._forward"},
        "loss": {**compiled, "kernel": "cross_entropy._forward"},
        "attend": {**compiled, "kernel": "attention._forward", "tensor_cores": {"HGMMA": 8}},
    }
    norm, loss, attend = (
        {"op": op, "sample": sample, "chip": 90, "pass": "forward"}
        for op, sample in (("rms_norm", "8B 2k"), ("cross_entropy", "32,000 classes 2k"), ("attention", "8B 2k"))
    )
    issued = {"bytes_issued": 101, "bytes_compulsory": 100, "flops_issued": 10, "flops_required": 10, "note": None}
    ratios = {"byte_ratio": 1.01, "flop_ratio": 1.0, **issued}
    return {
        "format": 1,
        "environment": {"torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7", "commit": None, "dirty": None},
        "chips": [90],
        "ops": {
            "rms_norm": {"matmuls": {}},
            "cross_entropy": {"matmuls": {}},
            "attention": {"matmuls": {"_forward": 2}},
        },
        "kernels": kernels,
        "launches": [
            {**norm, "kernel": "norm", "grid": [132]},
            {**loss, "kernel": "loss", "grid": [132]},
            {**attend, "kernel": "attend", "grid": [132]},
        ],
        "traffic": [
            {**norm, "width": 4096, **ratios},
            {**loss, "pass": "both", "width": 32000, **ratios},
            {**attend, "width": 128, **ratios, "byte_ratio": 5.0},
            {**attend, "sample": "8B 8k", "width": 128, **ratios, "byte_ratio": 5.0},
            {**loss, "sample": "8B 2k", "pass": "both", "width": 128256, **ratios, "byte_ratio": 1.5},
            {**norm, "pass": "backward", "width": 4096, **ratios, "byte_ratio": 1.0},
            {**norm, "sample": "wide", "width": 65536, **ratios},
            {**norm, "sample": "wide", "pass": "backward", "width": 65536, **ratios},
            {**attend, "pass": "backward", "width": 128, **ratios, "byte_ratio": 5.0},
            {**attend, "sample": "8B 8k", "pass": "backward", "width": 128, **ratios, "byte_ratio": 5.0},
        ],
        "floors": [{**norm, "predicted_microseconds": 12.5, "bound": "memory"}],
        "comparison": [{**norm, "peer": "liger", "figure": "spills", "ours": 0, "theirs": 5, "verdict": "better"}],
        "errors": [],
    }
