"""What the audit says of kernels that it compiles, broken ones among them, for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tilewright.cli.clone import command_of

# Kernels are compiled from a file, in a process without TRITON_INTERPRET.
KERNELS = """
import json, os, sys, torch, triton, triton.language as tl
from tilewright.cli.clone import load_benchmarks
load_benchmarks()
from tilewright.benchmarks.audit import compiled
from tilewright.kernels.ahead_of_time import captured_launches

@triton.jit
def double(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(y_ptr + offsets, 2 * x, mask=offsets < size)

@triton.jit
def softmax(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + tl.arange(0, BLOCK), e / tl.sum(e, axis=0) + x)

@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, depth, BLOCK: tl.constexpr, ALLOWED: tl.constexpr):
    tl.static_assert(ALLOWED, "not for this chip")
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        a = tl.load(a_ptr + rows * depth + start + columns)
        b = tl.load(b_ptr + (start + rows) * BLOCK + columns)
        total += tl.dot(a, b)
    tl.store(c_ptr + rows * BLOCK + columns, total)

x, y = torch.empty(1 << 20, dtype=torch.bfloat16), torch.empty(1 << 20)
launches = []

def launch(label, chip, call):
    with captured_launches(chip) as made:
        call()
    launches.extend(("broken", label, one) for one in made)

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        double[(4,)](x, y, 4096, BLOCK=1024, num_warps=4)
        return torch.empty_like(x)
    @staticmethod
    def backward(ctx, upstream):
        double[(8,)](x, y, 8192, BLOCK=1024, num_warps=4)
        return upstream

launch("sound", 80, lambda: Twice.apply(x[:4096].requires_grad_()).backward(torch.empty_like(x[:4096])))
launch("unaligned", 80, lambda: double[(4,)](x[1:], y[1:], 4095, BLOCK=1024, num_warps=4))
launch("huge block", 90, lambda: softmax[(1,)](x, y, BLOCK=8192, num_warps=2))
launch("matmul", 80, lambda: multiply[(1,)](x, x, y, 1024, BLOCK=64, ALLOWED=True, num_warps=4))
launch("matmul", 90, lambda: multiply[(1,)](x, x, y, 1024, BLOCK=64, ALLOWED=True, num_warps=4))
launch("too many stages", 80, lambda: multiply[(1,)](x, x, y, 1024, BLOCK=128, ALLOWED=True, num_warps=8, num_stages=6))
launch("refused", 80, lambda: multiply[(1,)](x, x, y, 1024, BLOCK=64, ALLOWED=False, num_warps=4))
for kernel in compiled.distinct_kernels(launches):
    for finding in compiled.findings(kernel):
        print(json.dumps(finding))
"""

Findings = dict[str, list[dict[str, Any]]]


def run_compiling(command: list[str], cache: Path) -> Findings:
    """What the process prints, by the kind of finding."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Findings = {}
    for line in done.stdout.splitlines():
        ((kind, finding),) = json.loads(line).items()
        found.setdefault(kind, []).append(finding)
    return found


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "kernels.py").write_text(KERNELS)
    return run_compiling([sys.executable, str(folder / "kernels.py")], folder / "cache")


def kernel_of(found: Findings, sample: str, chip: int) -> dict[str, Any]:
    """The figures of the one kernel that the sample launches."""
    (name,) = {launch["kernel"] for launch in found["launch"] if (launch["sample"], launch["chip"]) == (sample, chip)}
    (figures,) = (kernel for kernel in found["kernel"] if kernel["id"] == name)
    return figures


def test_launches_of_the_same_code_are_compiled_once_and_named_with_their_pass(broken: Findings) -> None:
    launches = [launch for launch in broken["launch"] if launch["sample"] == "sound"]
    assert [(launch["pass"], launch["grid"]) for launch in launches] == [("forward", [4]), ("backward", [8])]
    assert launches[0]["kernel"] == launches[1]["kernel"]
    assert len(broken["kernel"]) == len({kernel["id"] for kernel in broken["kernel"]}) == 6


def test_an_unaligned_pointer_shows_in_the_width_of_accesses(broken: Findings) -> None:
    sound = kernel_of(broken, "sound", 80)
    assert sound["global_accesses"] == sound["wide_accesses"] == 3, "8 bfloat16 in one load, 8 float32 in two stores"
    assert kernel_of(broken, "unaligned", 80)["wide_accesses"] == 0
    assert sound["constants"] == {"BLOCK": 1024}
    assert sound["occupancy"] == 1.0


def test_a_huge_block_shows_its_spills_and_its_stack(broken: Findings) -> None:
    huge = kernel_of(broken, "huge block", 90)
    assert huge["registers"] == 255
    assert huge["spill_loads"] > 0
    assert huge["spill_stores"] > 0
    assert huge["stack_bytes"] > 0
    assert huge["occupancy"] == 0.125
    assert huge["limited_by"] == "registers"
    sound = kernel_of(broken, "sound", 80)
    assert (sound["spill_loads"], sound["spill_stores"], sound["stack_bytes"]) == (0, 0, 0)


def test_a_matmul_shows_the_tensor_cores_of_each_generation_in_its_loop(broken: Findings) -> None:
    ampere, hopper = kernel_of(broken, "matmul", 80), kernel_of(broken, "matmul", 90)
    assert set(ampere["tensor_cores"]) == {"HMMA"}
    assert set(hopper["tensor_cores"]) == {"HGMMA"}
    for kernel in (ampere, hopper):
        assert kernel["hottest_loop"]["repeats"]
        assert kernel["hottest_loop"]["mix"]["tensor"] == sum(kernel["tensor_cores"].values())
        assert kernel["hottest_loop"]["instructions"] == sum(kernel["hottest_loop"]["mix"].values())


def test_a_block_past_the_chips_shared_memory_is_an_error_that_names_the_launch(broken: Findings) -> None:
    (error,) = (error for error in broken["error"] if error["sample"] == "too many stages")
    assert error["op"] == "broken"
    assert error["kernel"].endswith(".multiply")
    # Five tiles of a and of b in flight at once, 128 × 128 of 2 bytes each.
    assert error["message"] == (
        "a block takes 327,680 bytes of shared memory, and A100-SXM4-80GB gives a block 166,912"
    )
    assert kernel_of(broken, "too many stages", 80)["blocks_per_processor"] == 0


def test_code_that_the_compiler_refuses_is_an_error_that_names_the_launch_and_the_reason(broken: Findings) -> None:
    (error,) = (error for error in broken["error"] if error["sample"] == "refused")
    assert "not for this chip" in error["message"]
    assert error["pass"] == "forward"
    assert len(broken["error"]) == 2


def test_shares_of_an_op_are_the_whole_and_no_kernel_twice(tmp_path: Path) -> None:
    shares = [
        run_compiling(command_of("audit.compiled", "swiglu", "--chips", "80", "--share", f"{part}/2"), tmp_path)
        for part in (0, 1)
    ]
    assert [share["total"] for share in shares] == [[1], [1]]
    names = [kernel["kernel"] for share in shares for kernel in share["kernel"]]
    assert sorted(names) == ["gated._backward", "gated._forward"]
    for share in shares:
        assert {launch["kernel"] for launch in share["launch"]} == {share["kernel"][0]["id"]}
        assert {launch["chip"] for launch in share["launch"]} == {80}
    assert not any(tmp_path.iterdir()), "the cache that the process was given stays out of it"
