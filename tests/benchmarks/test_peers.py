"""Other libraries through the instruments of the audit: what they launch, what it issues, and how ours compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

from tilewright.benchmarks.audit.peers import audit, compare
from tilewright.benchmarks.audit.peers.counterpart import PEERS, specs_of
from tilewright.benchmarks.audit.peers.stand_in import standing_in_for
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError


def first(try_one: Any, count: int) -> Any:
    return try_one(0)


@pytest.mark.parametrize(("chip", "capability", "shared"), [(80, (8, 0), 166912), (90, (9, 0), 232448)])
def test_a_cpu_tensor_answers_as_the_gpu_would(chip: int, capability: tuple[int, int], shared: int) -> None:
    from triton.runtime import driver

    x = torch.zeros(3)
    with standing_in_for(chip, 17, first):
        assert (x.device.type, x.is_cuda) == ("cuda", True)
        assert torch.cuda.get_device_capability(x.device) == capability
        assert torch.cuda.get_device_properties(x.device).multi_processor_count == 17
        properties = driver.active.utils.get_device_properties(0)
        assert (properties["multiprocessor_count"], properties["max_shared_mem"]) == (17, shared)
        made = torch.ones(2, device=x.device) + torch.ones_like(x, device="cuda")[:2]
    assert made.device.type == x.device.type == "cpu"
    assert made.tolist() == [2, 2]
    assert not torch.cuda.is_available()


def test_the_backward_pass_sees_the_gpu_too_and_a_loss_has_the_gradient_one() -> None:
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return (x * x).sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            seen.append((x.device.type, gradient.item()))
            return 2 * gradient * x

    x = torch.tensor([3.0], requires_grad=True)
    with standing_in_for(90, 1, first):
        (gradient,) = torch.autograd.grad([Square.apply(x)], [x], [torch.tensor(float("nan"))])
    assert seen == [("cuda", 1.0)]
    assert gradient.item() == 6


def test_what_a_tuner_chooses_never_reaches_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/the/users/own")
    with standing_in_for(90, 1, first):
        assert os.environ["TRITON_CACHE_DIR"] != "/the/users/own"
        assert os.environ["FLA_CACHE_RESULTS"] == "0"
    assert os.environ["TRITON_CACHE_DIR"] == "/the/users/own"


def test_a_library_that_is_not_installed_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "no-such-library", "1.0")
    with pytest.raises(TrainingError, match=r"no-such-library is not installed: pip install no-such-library==1.0"):
        audit("no-such-library", [], [90], Console())
    with pytest.raises(TrainingError, match="takes liger-kernel or flash-linear-attention"):
        audit("unsloth", [], [90], Console())


LISTED = """
import json, torch
from tilewright.cli.clone import load_benchmarks
load_benchmarks()
from tilewright.benchmarks.audit.peers.counterpart import specs_of
from tilewright.benchmarks.audit.peers.stand_in import standing_in_for
from tilewright.kernels.ahead_of_time import launches_of
from tilewright.benchmarks.audit.peers.worker import _fewest_spills
with standing_in_for(90, 132, _fewest_spills(90)):
    for spec in specs_of(PEER, [OP]):
        for label, launch in launches_of(spec, torch.bfloat16, 90):
            constants = {name: x for name, x in launch.options.items() if isinstance(x, int)}
            print(json.dumps([label, launch.name, launch.grid, launch.backward, constants]))
"""


def listed(peer: str, op: str) -> list[list[Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = LISTED.replace("PEER", repr(peer)).replace("OP", repr(op))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_liger_divides_rows_among_the_processors_of_the_chip() -> None:
    pytest.importorskip("liger_kernel")
    launches = {(label, name): rest for label, name, *rest in listed("liger-kernel", "layer_norm")}
    grid, backward, constants = launches["8B 2k", "layer_norm._layer_norm_backward_kernel"]
    assert (grid, backward) == ([132], True)
    assert constants["rows_per_program"] == 125  # 16,384 rows among 132
    assert constants["num_warps"] == 8


def test_fla_chooses_by_shared_memory_and_a_tuned_launch_is_launched_once() -> None:
    pytest.importorskip("fla")
    launches = listed("flash-linear-attention", "swiglu")
    forward = [launch for launch in launches if launch[0] == "125M 2k" and not launch[3]]
    assert len(forward) == 1
    _, name, grid, _, constants = forward[0]
    assert name == "ops.swiglu_fwd_kernel"
    assert grid == [8 * 2048 * 3072 // constants["B"]]


@pytest.mark.parametrize("peer", PEERS)
def test_what_a_library_issues_is_counted_by_the_counter_of_our_own_ops(peer: str) -> None:
    pytest.importorskip({"liger-kernel": "liger_kernel", "flash-linear-attention": "fla"}[peer])
    from tilewright.benchmarks.audit.issued import findings

    with standing_in_for(90, 1, first):
        (spec,) = specs_of(peer, ["rms_norm"])
        total, *found = findings([narrowed(spec)], [90])
    assert total == {"total": 1}
    forward, backward, _ = found[0]["traffic"]
    rows, width = 8 * 16, 768
    # In and out, and the weight once for each row; the statistics are written besides.
    assert forward["bytes_issued"] == 2 * (3 * rows * width) + 4 * rows
    assert backward["bytes_compulsory"] == 2 * (3 * rows * width) + 2 * 2 * width
    assert 1 < backward["byte_ratio"] < 1.1


def test_zeros_made_like_a_tensor_are_written_and_the_tensor_is_not_read() -> None:
    from tilewright.benchmarks.audit.counting import counting

    x = torch.empty(4, 8)
    with counting() as issued:
        torch.zeros_like(x)
    assert issued.taken().bytes == x.nbytes


def narrowed(spec: Any) -> Any:
    """The spec with its first small sample alone."""
    from dataclasses import replace

    return replace(spec, audit_samples=lambda dtype, small: iter([next(spec.audit_samples(dtype, small))]))


def test_counterparts_keep_the_labels_and_shapes_of_our_samples() -> None:
    pytest.importorskip("liger_kernel")
    ours = next(spec for spec in SPECS if spec.name == "rotary")
    labels = {sample.label: sample for sample in ours.audit_samples(torch.bfloat16, True)}
    with standing_in_for(90, 1, first):
        (spec,) = specs_of("liger-kernel", ["rotary"])
        samples = list(spec.audit_samples(torch.bfloat16, True))
    assert samples
    for sample in samples:
        assert sample.tensors["q"].shape == labels[sample.label].tensors["q"].shape
        assert sample.tensors["q"].is_contiguous()
        assert "positions" not in sample.tensors


def audited(spills: int, issued: int | None, *, tensor_cores: str = "HGMMA", op: str = "rms_norm") -> dict[str, Any]:
    where = {"op": op, "sample": "8B 2k", "chip": 90, "pass": "forward"}
    kernel = {
        "spill_loads": spills,
        "spill_stores": spills,
        "stack_bytes": 8 * spills,
        "tensor_cores": {tensor_cores: 4},
    }
    ratio = None if issued is None else issued / 1000
    traffic = {**where, "bytes_issued": issued, "bytes_compulsory": 1000, "byte_ratio": ratio, "flops_issued": 10}
    return {
        "peer": "liger-kernel",
        "kernels": {"k": kernel},
        "launches": [{**where, "kernel": "k"}, {**where, "kernel": "k"}],
        "traffic": [traffic],
        "floors": [{**where, "predicted_microseconds": 3.0 if issued is None else issued / 100}],
    }


def verdicts(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any, str]]:
    rows = [row for row in compare(ours, theirs) if row["pass"] == "forward"]
    return {row["figure"]: (row["ours"], row["theirs"], row["verdict"]) for row in rows}


def test_each_figure_is_judged_and_smaller_is_better() -> None:
    found = verdicts(audited(3, 1000), audited(1, 1500))
    assert found["spills"] == (6, 2, "worse")  # a kernel that is launched twice spills once
    assert found["stack bytes"] == (24, 8, "worse")
    assert found["bytes issued ÷ compulsory"] == (1.0, 1.5, "better")
    assert found["predicted floor, µs"] == (10.0, 15.0, "better")
    assert "FLOPs issued" not in found  # of no interest where memory binds
    assert "tensor cores" not in found


def test_half_a_percent_of_bytes_is_equal_and_a_spill_is_not() -> None:
    assert verdicts(audited(0, 1005), audited(0, 1000))["bytes issued ÷ compulsory"][2] == "equal"
    assert verdicts(audited(0, 1006), audited(0, 1000))["bytes issued ÷ compulsory"][2] == "worse"
    assert verdicts(audited(0, 1000), audited(1, 1000))["spills"][2] == "better"


def test_an_older_chips_matrix_instructions_are_worse() -> None:
    hopper = audited(0, 1000, op="attention")
    ampere = audited(0, 1000, op="attention", tensor_cores="HMMA")
    assert verdicts(hopper, ampere)["tensor cores"] == ("HGMMA", "HMMA", "better")
    assert verdicts(hopper, ampere)["FLOPs issued"] == (10, 10, "equal")
    assert "bytes issued ÷ compulsory" not in verdicts(hopper, ampere)  # caches serve what is read again
    assert verdicts(ampere, hopper)["tensor cores"] == ("HMMA", "HGMMA", "worse")


def test_passes_that_share_a_read_are_compared_together_and_what_is_not_counted_is_left_out() -> None:
    ours, theirs = audited(1, None), audited(0, None)
    rows = compare(ours, theirs)
    assert {row["pass"] for row in rows} == {"both"}
    assert {row["figure"]: row["verdict"] for row in rows} == {"spills": "worse", "stack bytes": "worse"}


def test_a_launch_that_the_chip_cannot_run_is_no_row() -> None:
    theirs = audited(0, 1000)
    theirs["errors"] = [{"op": "rms_norm", "sample": "8B 2k", "chip": 90, "message": "too much shared memory"}]
    assert compare(audited(1, 1000), theirs) == []
