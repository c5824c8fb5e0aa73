"""The kernels' suite: every op has cases and checked rows, a wrong provider gets no time, and the record says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.benchmarks import peaks
from tilewright.benchmarks.kernels import contest as contest_module
from tilewright.benchmarks.kernels.contest import Judge, Step, contest
from tilewright.benchmarks.kernels.providers import PROVIDERS, NotServed, Provider
from tilewright.benchmarks.kernels.shapes import Case, cases, drawn
from tilewright.benchmarks.peaks import Peaks
from tilewright.cli.main import main
from tilewright.kernels.registry import SPECS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PEAKS = Peaks(1e10, {"bfloat16": 1e12, "float32": 1e12})
BY_NAME = {spec.name: spec for spec in SPECS}
RMS_NORM = Case(BY_NAME["rms_norm"], "125M 2k", torch.float32)


def small(monkeypatch: pytest.MonkeyPatch, **providers: Provider) -> dict[str, Any]:
    monkeypatch.setattr(
        contest_module, "PROVIDERS", {**{n: PROVIDERS[n] for n in ("ours", "torch eager")}, **providers}
    )
    return contest(RMS_NORM, CPU, PEAKS, seconds=0.0, least=6)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_quick_suite_has_one_shape_of_every_op(device: torch.device) -> None:
    chosen = list(cases(device, (torch.bfloat16,), quick=True))
    assert [case.spec.name for case in chosen] == [spec.name for spec in SPECS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_the_same_work_are_timed_once(dtype: torch.dtype) -> None:
    names = [str(case) for case in cases(CUDA, (dtype,), quick=False)]
    assert len(set(names)) == len(names)
    ends = [name.split(maxsplit=1)[1] for name in names if name.startswith("attention 8B")]
    assert f"8B 2k {str(dtype)[6:]}" in ends
    assert f"8B 32k {str(dtype)[6:]}" in ends
    # Rows are rows, however many sequences they come from.
    assert not any(name.startswith("rms_norm 8B 8k") for name in names)


def test_on_a_gpu_what_is_compared_with_float64_is_small() -> None:
    for case in cases(CUDA, (torch.bfloat16,), quick=False):
        tensors = case.checked(CUDA).tensors
        assert sum(8 * x.numel() for x in tensors.values()) < 2e9, str(case)
        if case.spec.name == "attention":  # whole matrices of scores
            tokens, heads = tensors["q"].shape[-3:-1]
            assert 8 * heads * tokens**2 < 8e9, str(case)
        if "hidden" in tensors:  # whole matrices of logits
            assert 8 * tensors["hidden"].shape[0] * tensors["weight"].shape[0] < 8e9, str(case)
        assert case.checked(CUDA).options == case.timed(CUDA).options


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_fresh_inputs_suit_every_op(name: str) -> None:
    case = next(case for case in cases(CPU, (torch.float32,), quick=True) if case.spec.name == name)
    if name == "attention":
        sample = case._declared(small=True)
        sample = Case(case.spec, sample.label, torch.float32).checked(CPU)
        sample.tensors.update({key: x[:, :64] for key, x in sample.tensors.items()})
    else:
        sample = case.timed(CPU)
        if "hidden" in sample.tensors:
            sample.tensors.update({k: x[:8] for k, x in sample.tensors.items() if not k.endswith("weight")})
    made = drawn(sample, CPU, torch.Generator().manual_seed(0))
    again = drawn(sample, CPU, torch.Generator().manual_seed(1))
    assert {n: x.stride() for n, x in made.tensors.items()} == {n: x.stride() for n, x in sample.tensors.items()}
    floating = [n for n, x in made.tensors.items() if x.is_floating_point()]
    assert not any(torch.equal(made.tensors[n], again.tensors[n]) for n in floating)
    step = Step(case.spec, case.spec.function, made)
    step()
    assert step.output_bytes > 0


def test_rows_carry_every_column_and_belong_to_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = small(monkeypatch)
    x = RMS_NORM.timed(CPU).tensors["x"].nbytes
    weight = RMS_NORM.timed(CPU).tensors["weight"].nbytes
    for outcome in outcomes.values():
        assert set(outcome.rounds) == {"forward", "backward", "both"}
        assert {len(rounds) for rounds in outcome.rounds.values()} == {6}
        columns = outcome.columns["both"]
        assert columns["median_seconds"] > 0
        assert columns["algorithm_memory_bytes"] == 4 * x + 2 * weight  # x, y and their gradients
        assert columns["peak_memory_bytes"] >= columns["algorithm_memory_bytes"]
        assert outcome.columns["forward"]["algorithm_memory_bytes"] == 2 * x + weight
        assert columns["implementation"]
    assert outcomes["ours"].columns["forward"]["implementation"].startswith("reference: off CUDA")


@pytest.mark.parametrize(("cache", "cold"), [(2**10, True), (2**40, False), (0, False)])
def test_a_row_whose_inputs_may_lie_in_the_cache_says_so(
    monkeypatch: pytest.MonkeyPatch, cache: int, cold: bool
) -> None:
    monkeypatch.setattr(peaks, "cache_bytes", lambda device: cache)
    for outcome in small(monkeypatch).values():
        for columns in outcome.columns.values():
            assert columns["cold"] is cold
            assert ("its GB/s are not those of memory" in columns["note"]) is not cold
            assert (columns["share_of_measured_peak"] is None) is not cold


def test_a_wrong_provider_gets_no_time_and_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return RMS_NORM.spec.reference(x, weight) + 1e-4

    def missing(*_: Any) -> Any:
        raise NotServed("nowhere to be found")

    def broken(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nmore")

    outcomes = small(
        monkeypatch,
        off=Provider(lambda *_: slightly_off),
        absent=Provider(missing),
        broken=Provider(lambda *_: broken),
    )
    assert outcomes["off"].refused.startswith("wrong: its error is")
    assert outcomes["absent"].left_out == "nowhere to be found"
    assert outcomes["broken"].refused == "RuntimeError: no kernel image"
    assert [name for name, outcome in outcomes.items() if outcome.rounds] == ["ours", "torch eager"]


def test_a_wrong_gradient_is_refused_too() -> None:
    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy.mul_(1.001)  # over the upstream gradient, which is not to spoil it for the next

    judge = Judge(RMS_NORM, drawn(RMS_NORM.checked(CPU), CPU, torch.Generator().manual_seed(0)))
    reference = RMS_NORM.spec.reference
    assert judge.error_ratio(reference) <= 0.5
    assert judge.error_ratio(lambda x, weight: Forgets.apply(reference(x, weight))) > 1
    assert judge.error_ratio(reference) <= 0.5
    assert judge.error_ratio(lambda x, weight: reference(x, weight) * torch.nan) == float("inf")


def test_what_overwrites_its_inputs_leaves_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def overwriting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = RMS_NORM.spec.reference(x, weight)
        x.detach().zero_()
        return y.clone()

    def watching(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().abs().sum().item())
        return RMS_NORM.spec.reference(x, weight)

    small(
        monkeypatch,
        overwrites=Provider(lambda *_: overwriting, overwrites=True),
        watches=Provider(lambda *_: watching),
    )
    assert min(seen) > 0


def test_packages_that_are_not_here_or_need_a_gpu_say_so() -> None:
    for name in ("liger-kernel", "flash-attn", "apex"):
        spec = BY_NAME["attention" if name == "flash-attn" else "rms_norm"]
        with pytest.raises(NotServed, match=r"not installed|CUDA devices only"):
            PROVIDERS[name].function_of(spec, CPU)
    with pytest.raises(NotServed, match="PyTorch has no rotary"):
        PROVIDERS["torch fused"].function_of(BY_NAME["rotary"], CPU)
    with pytest.raises(NotServed, match="SDPA has no window"):
        PROVIDERS["torch fused"].function_of(BY_NAME["attention"], CPU)(*torch.zeros(3, 1, 4, 1, 8), window=2)


def test_the_command_writes_a_record_with_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # pytest-benchmark measures nothing in a worker of pytest-xdist, as which these tests may run.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # Compiling takes a C++ compiler seconds, and says nothing of the command.
    for name in ("ours compiled", "torch.compile"):
        monkeypatch.setitem(PROVIDERS, name, Provider(_not_here))
    output = tmp_path / "record.json"
    assert main(["benchmark", "run", "--suite", "quick", "--only", "relu2", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    rows = [(row["extra_info"]["provider"], row["extra_info"]["pass"]) for row in written["benchmarks"]]
    assert rows == [(p, d) for p in ("ours", "torch eager") for d in ("forward", "backward", "both")]
    for row in written["benchmarks"]:
        info = row["extra_info"]
        assert info["op"] == "relu2"
        assert info["dtype"] == "bfloat16"
        assert len(row["stats"]["data"]) == info["rounds"]
        assert row["stats"]["median"] == info["median_seconds"]
    record = written["tilewright_record"]
    assert record["suite"] == "quick"
    assert "median_seconds" in record["definitions"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert {"liger-kernel", "torch fused", "apex"} <= {row["provider"] for row in record["left_out"]}
    assert "node" not in written["machine_info"]
    shown = capsys.readouterr().out
    assert "relu2" in shown
    assert str(output) in shown.replace("\n", "")


def _not_here(*_: Any) -> Any:
    raise NotServed("left out by this test")


def test_an_unknown_op_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "run", "--only", "rmsnorm"]) == 2
    assert "--only is rmsnorm, which is no op; there are adamw" in capsys.readouterr().err
