"""What a kernel issues is counted as it is, and what was broken on purpose shows."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tilewright.benchmarks.audit import audit as auditing
from tilewright.benchmarks.audit import baseline
from tilewright.benchmarks.audit import issued as issued_module
from tilewright.benchmarks.audit.counting import counting
from tilewright.benchmarks.audit.issue import Issued
from tilewright.benchmarks.audit.issued import findings, traffic
from tilewright.cli.main import main
from tilewright.kernels.accuracy import outputs_of
from tilewright.kernels.dispatch import use
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError

BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    with use("triton"):
        yield


@pytest.fixture(scope="module")
def broken() -> ModuleType:
    spec = importlib.util.spec_from_file_location("broken_kernels", Path(__file__).with_name("broken_kernels.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def byte_ratio(broken: ModuleType) -> Callable[[str], float]:
    def of(name: str) -> float:
        spec = broken.spec_of(name)
        with counting() as issued:
            (row,) = traffic(spec, next(spec.audit_samples(torch.bfloat16, True)), 90, issued)
        return row["byte_ratio"]

    return of


def test_a_kernel_that_reads_once_and_writes_once_issues_what_it_cannot_do_without(byte_ratio: Any) -> None:
    assert byte_ratio("double") == 1.0


@pytest.mark.parametrize(("more", "named"), [(Work(10**9, 0), "operations"), (Work(0, 1), "bytes")])
def test_work_that_asks_more_than_the_kernels_do_is_an_error(broken: ModuleType, more: Work, named: str) -> None:
    spec = broken.spec_of("double")
    work = lambda sample: Passes(Work(*map(sum, zip(spec.work(sample).forward, more, strict=True))))  # noqa: E731
    with counting() as issued, pytest.raises(TrainingError, match=f"issue .* {named}, fewer than the .* `work`"):
        traffic(replace(spec, work=work), next(spec.audit_samples(torch.bfloat16, True)), 90, issued)


def test_an_extra_load_shows_as_half_as_much_again(byte_ratio: Any) -> None:
    assert byte_ratio("reading twice") == 1.5


def test_a_missing_mask_shows_as_the_lanes_past_the_row_and_touches_no_memory(byte_ratio: Any) -> None:
    assert byte_ratio("without mask") == 1024 / 1000


@pytest.mark.parametrize("name", ["reading twice", "without mask"])
def test_a_kernel_that_issues_more_than_the_accepted_one_fails_the_audit_and_is_named(
    name: str,
    broken: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def audit_of(kernel: str) -> dict[str, Any]:
        found = auditing.merged(findings([broken.spec_of(kernel)], [90]))
        environment = {"triton": "3.7.1"}
        ops = {"double": {"matmuls": {}}}
        return {"environment": environment, "chips": [90], "ops": ops, "floors": [], **found}

    baseline.accept(audit_of("double"), tmp_path, "the first")
    monkeypatch.setattr(auditing, "audit", lambda *_: audit_of("double"))
    assert main(["audit", "--baseline", str(tmp_path)]) == 0
    monkeypatch.setattr(auditing, "audit", lambda *_: audit_of(name))
    assert main(["audit", "--baseline", str(tmp_path)]) == 1
    assert "double (double rows, forward, sm_90): bytes issued ÷ compulsory rose from 1.0 to" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu", "rotary"])
def test_a_width_is_audited_whose_missing_mask_would_break_the_bar(name: str) -> None:
    samples = BY_NAME[name].audit_samples(torch.bfloat16, True)
    widths = {next(iter(sample.tensors.values())).shape[-1] for sample in samples}
    assert any(triton.next_power_of_2(width) > 1.05 * width for width in widths if width <= 8192)


def test_an_op_with_a_gradient_has_three_passes_whose_bytes_add_up() -> None:
    spec = BY_NAME["rms_norm"]
    with counting() as issued:
        forward, backward, both = traffic(spec, Sample("8 rows", {"x": torch.empty(8, 64)}), 80, issued)
    assert [row["pass"] for row in (forward, backward, both)] == ["forward", "backward", "both"]
    statistics = 8 * 4
    assert forward["bytes_issued"] == 2 * 8 * 64 * 4 + statistics  # x in, y and rstd out
    assert backward["bytes_issued"] == 3 * 8 * 64 * 4 + statistics  # x, dy and rstd in, dx out
    assert both["bytes_issued"] == forward["bytes_issued"] + backward["bytes_issued"]
    assert forward["width"] == 64


def test_passes_that_share_a_read_are_judged_together() -> None:
    spec = BY_NAME["cross_entropy"]
    tensors = {"logits": torch.empty(2, 4096), "targets": torch.zeros(2, dtype=torch.int64)}
    with counting() as issued:
        forward, backward, both = traffic(spec, Sample("2 rows", tensors), 90, issued)
    assert forward["byte_ratio"] is None
    assert backward["byte_ratio"] is None
    assert "both" in forward["note"]
    assert 1.0 <= both["byte_ratio"] < 1.1


def test_matrix_products_left_to_pytorch_are_refused_with_a_note_and_not_called_zero() -> None:
    spec = BY_NAME["linear_logprob"]
    head = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(16, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with counting() as issued:
        rows = traffic(spec, Sample("4 rows", head), 90, issued)
    assert all(row["byte_ratio"] is None and row["bytes_issued"] is None and row["note"] for row in rows)


def test_attention_is_held_to_the_matrix_products_of_its_own_kernels() -> None:
    """Of 256 causal tokens in blocks of 128 queries and 64 keys, the products cover 6 of 8 blocks; needed is half."""
    spec = BY_NAME["attention"]
    tensors = {name: torch.empty(1, 256, 1, 64, dtype=torch.bfloat16) for name in ("q", "k", "v")}
    with counting() as issued:
        forward, backward, _ = traffic(spec, Sample("256 tokens", tensors), 90, issued)
    pairs = 256 * 257 // 2
    assert forward["flops_required"] == 2 * 2 * pairs * 64
    assert forward["flops_issued"] == 2 * 2 * 64 * (6 * 128 * 64)
    assert backward["flops_required"] == 7 * 2 * pairs * 64


@triton.jit
def _by_integers(x_ptr, starts_ptr, count, BLOCK: tl.constexpr):
    """Loads that an integer carried from turn to turn, and one in memory, decide."""
    lanes = tl.arange(0, BLOCK)
    turns = tl.zeros([], tl.int32)
    for _turn in range(count):
        turns = turns + 1
        tl.load(x_ptr + lanes, mask=lanes < tl.where(turns == 4, 5, 0), other=0.0)
    for turn in range(count):
        tl.load(x_ptr + lanes, mask=lanes < tl.load(starts_ptr + turn), other=0.0)


def test_turns_that_depend_on_integers_are_all_run() -> None:
    ends = torch.tensor([0, 0, 0, 0, 7, 0, 0, 0], dtype=torch.int32)
    with counting() as issued:
        _by_integers[(1,)](torch.empty(16), ends, 8, BLOCK=16)
    assert issued.bytes == 4 * 5 + 4 * (8 + 7)


@triton.jit
def _ragged(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < size), mask=lanes < size)


def test_a_last_turn_that_is_cut_short_is_counted_as_it_is() -> None:
    with counting() as issued:
        _ragged[(1,)](torch.empty(1000), torch.empty(1000), 1000, BLOCK=16)
    assert issued.bytes == 2 * 4 * 1000


def test_two_launches_alike_count_twice() -> None:
    x = torch.empty(1000)
    with counting() as issued:
        _ragged[(1,)](x, torch.empty(1000), 1000, BLOCK=16)
        once = issued.taken().bytes
        _ragged[(1,)](x, torch.empty(1000), 1000, BLOCK=16)
    assert issued.bytes == once > 0


def test_what_pytorch_moves_between_the_kernels_counts() -> None:
    x = torch.empty(100)
    with counting() as issued:
        (x.view(10, 10).t() + 1.0).sum()
        x.expand(50, 100).contiguous()
    assert issued.bytes == 4 * (100 + 100) + 4 * (100 + 1) + 4 * (100 + 5000)


def _issued_by(spec: OpSpec, sample: Sample, **options: Any) -> list[tuple[int, ...]]:
    """The counts of forward and backward."""
    with counting(**options) as issued:
        return [counted.counts[:3] for counted in _passes(spec, sample, issued)]


def _passes(spec: OpSpec, sample: Sample, issued: Issued) -> Iterator[Issued]:
    names = spec.differentiable(sample)
    tensors = {name: x.detach().requires_grad_(name in names) for name, x in sample.tensors.items()}
    results = [r for r in outputs_of(spec.function(**tensors, **sample.options)) if r.requires_grad]
    yield issued.taken()
    if names:
        torch.autograd.grad(results, [tensors[name] for name in names], [torch.empty_like(r) for r in results])
        yield issued.taken()


@pytest.mark.parametrize(
    ("op", "labels"),
    [
        ("attention", ("130 by 200, full", "window", "packed (60, 130, 1)", "more queries", "127 tokens")),
        ("rms_norm", ("7x127", "residual, width 16400", "127x7")),
        ("layer_norm", ("residual, width 16400",)),
        ("rotary", ("three rows",)),
        ("cross_entropy", ("row stride",)),
    ],
)
def test_leaving_turns_out_loses_nothing(op: str, labels: tuple[str, ...]) -> None:
    spec = BY_NAME[op]
    samples = {sample.label: sample for sample in spec.samples(torch.device("cpu"), torch.float32)}
    for label in labels:
        assert _issued_by(spec, samples[label]) == _issued_by(spec, samples[label], every_turn=True), label


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("op", "label"), [("attention", "window"), ("rms_norm", "7x127"), ("swiglu", "7x127")])
def test_not_computing_counts_the_bytes_that_computing_moves(
    op: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    spec = BY_NAME[op]
    sample = next(s for s in spec.samples(torch.device("cpu"), torch.float32) if s.label == label)
    quick = [counts[0] for counts in _issued_by(spec, sample)]
    moved = Issued()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved.bytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.bytes += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    assert [counted.bytes for counted in _passes(spec, sample, moved)] == quick


def test_an_op_that_fails_is_an_error_with_its_name_and_the_others_go_on(broken: ModuleType) -> None:
    from dataclasses import replace

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing")

    good = broken.spec_of("double")
    total, error, row = findings([replace(good, function=fails), good], [90])
    assert total == {"total": 2}
    assert error["error"]["op"] == "double"
    assert "no such thing" in error["error"]["message"]
    assert row["traffic"][0]["byte_ratio"] == 1.0


def test_counting_in_a_process_that_does_not_interpret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issued_module, "INTERPRETED", False)
    with pytest.raises(TrainingError, match="TRITON_INTERPRET=1"):
        next(findings(SPECS, [90]))


@triton.jit
def _counting_up(place_ptr, x_ptr, BLOCK: tl.constexpr):
    """Reads one element more each time that it is launched."""
    count = tl.load(place_ptr)
    tl.load(x_ptr + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < count, other=0.0)
    tl.store(place_ptr, count + 1)


def test_a_launch_that_leaves_integers_behind_is_carried_out_each_time() -> None:
    place, x = torch.zeros(1, dtype=torch.int32), torch.empty(16)
    with counting() as issued:
        for _ in range(4):
            _counting_up[(1,)](place, x, BLOCK=16)
    assert place.item() == 4
    assert issued.bytes == 4 * (4 + 4) + 4 * (0 + 1 + 2 + 3)


@triton.jit
def _cut_at_both_ends(x_ptr, size, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) - 3
    tl.load(x_ptr + lanes, mask=(lanes >= 0) & (lanes < size), other=0.0)
    for start in range(-3, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.load(x_ptr + place, mask=(place >= 0) & (place < size), other=0.0)


def test_programs_and_turns_that_are_cut_at_both_ends_alike_are_not_taken_for_those_between() -> None:
    programs, size = 8, 8 * 16 - 6
    with counting() as issued:
        _cut_at_both_ends[(programs,)](torch.empty(size), size, BLOCK=16)
    assert issued.bytes == 4 * size + programs * 4 * size


def test_many_programs_alike_count_as_many() -> None:
    with counting() as issued:
        _ragged[(100, 3)](torch.empty(64), torch.empty(64), 64, BLOCK=16)
    assert issued.bytes == 300 * 2 * 4 * 64
