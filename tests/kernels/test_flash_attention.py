"""When flash-attn is chosen for attention and how it is called: stand-ins compute the same in plain PyTorch."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.kernels import attention, choose_attention, dispatch, flash_attention, use
from tilewright.kernels.attention import reference

Calls = list[tuple[str, dict[str, Any]]]
ORDERS = {  # the order of the arguments as each generation's flash_attn_func has it
    "flash-attn 2": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic",
    "flash-attn 3": "q k v softmax_scale causal qv window_size attention_chunk softcap num_splits deterministic",
    "flash-attn 4": "q k v softmax_scale causal window_size learnable_sink softcap num_splits deterministic",
}


def stand_in(name: str, calls: Calls, registers_ops: bool = True) -> types.ModuleType:
    """A module with one generation's two functions, which write down how they are called."""

    def attend(kind: str, arguments: dict[str, Any]) -> Any:
        calls.append((kind, arguments))
        left, _ = arguments["window_size"]
        window = None if left in (None, -1) else left + 1
        out = reference(
            arguments["q"],
            arguments["k"],
            arguments["v"],
            causal=arguments["causal"],
            scale=arguments["softmax_scale"],
            window=window,
            softcap=arguments["softcap"] or None,
            cu_seqlens=arguments.get("cu_seqlens_q"),
        )
        return (out, None) if name == "flash-attn 4" else out

    def function(kind: str, names: list[str]) -> Callable[..., Any]:
        scope: dict[str, Any] = {"attend": attend}
        parameters = ", ".join(n if n in ("q", "k", "v") else f"{n}=None" for n in names)
        exec(f"def f({parameters}): return attend({kind!r}, dict(locals()))", scope)
        made: Callable[..., Any] = scope["f"]
        return made

    names = ORDERS[name].split()
    documents = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    module = types.ModuleType(flash_attention._MODULES[name])
    module.flash_attn_func = function("dense", names)  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = function("packed", names[:3] + documents + names[3:])  # type: ignore[attr-defined]
    if registers_ops and name != "flash-attn 4":

        @torch.library.custom_op(f"stand_in::forward_{name[-1]}", mutates_args=())
        def _flash_attn_forward(q: torch.Tensor) -> torch.Tensor:
            return q.clone()

        module._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
    return module


class Machine:
    """A pretended GPU of some generation with some flash-attn installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Calls = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(dispatch, "choose", lambda device, dtype: dispatch.Choice("triton", "on a CUDA device"))
        monkeypatch.setattr(flash_attention, "_found", {})
        self.is_a(90)

    def is_a(self, chip: int) -> None:
        self.monkeypatch.setattr(flash_attention, "chip_of", lambda device: chip)

    def has(self, *names: str, registers_ops: bool = True) -> None:
        for name in names:
            self.install(flash_attention._MODULES[name], stand_in(name, self.calls, registers_ops))

    def install(self, path: str, module: types.ModuleType) -> None:
        if "." in path:
            self.monkeypatch.setitem(sys.modules, path.split(".")[0], types.ModuleType(path.split(".")[0]))
        self.monkeypatch.setitem(sys.modules, path, module)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, triton_kernels: None) -> Any:
    with use("auto"):
        yield Machine(monkeypatch)


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def packed(tokens: int) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([0, 3, tokens], dtype=torch.int32), "max_seqlen": tokens}


ALL = ("flash-attn 2", "flash-attn 3", "flash-attn 4")


@pytest.mark.parametrize(("chip", "number"), [(80, "2"), (86, "2"), (90, "3"), (100, "4")])
def test_each_chip_is_served_by_its_own_generation(machine: Machine, chip: int, number: str) -> None:
    machine.has(*ALL)
    machine.is_a(chip)
    assert choose_attention(*qkv(1, 8, 2, 64)).implementation == f"flash-attn {number}"


def test_a_chip_without_a_generation_of_its_own_runs_triton(machine: Machine) -> None:
    machine.has(*ALL)
    machine.is_a(75)
    assert choose_attention(*qkv(1, 8, 2, 64)).implementation == "triton"


def test_hopper_falls_back_from_the_third_to_the_second(machine: Machine) -> None:
    machine.has("flash-attn 2", "flash-attn 4")
    choice = choose_attention(*qkv(1, 8, 2, 64))
    assert choice.implementation == "flash-attn 2"
    with torch.no_grad():
        assert choose_attention(*qkv(1, 8, 2, 64)).implementation == "flash-attn 4"


def test_without_flash_attn_the_triton_kernels_serve_and_the_reason_is_the_usual_one(machine: Machine) -> None:
    assert choose_attention(*qkv(1, 8, 2, 64)) == dispatch.Choice("triton", "on a CUDA device")


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_demanded_implementation_is_not_overridden(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    machine.has(*ALL)
    monkeypatch.setattr(dispatch, "choose", lambda device, dtype: dispatch.Choice(mode, "demanded"))
    with use(mode):
        assert choose_attention(*qkv(1, 8, 2, 64)) == dispatch.Choice(mode, "demanded")


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (qkv(1, 8, 2, 64, dtype=torch.float32), {}, "takes float16 and bfloat16, not torch.float32"),
        (qkv(1, 8, 2, 64), {"sinks": torch.zeros(2)}, "gives no gradient for sinks"),
        (qkv(1, 8, 2, 64), {"return_lse": True}, "gives no gradient for the log-sum-exp"),
        (qkv(1, 8, 2, 20), {}, "takes multiples of 8 as head_dim, not 20"),
        ([qkv(1, 8, 2, 64)[0], *qkv(1, 4, 2, 64)[1:]], {"window": 2, "causal": False}, "misplaces a window"),
        (qkv(0, 8, 2, 64), {}, "does not take these strides or sizes"),
        (qkv(70000, 1, 1, 8), {}, "does not take these strides or sizes"),
        ([x[..., 1:65] for x in qkv(1, 8, 2, 72)], {}, "does not take these strides or sizes"),
        ([x.transpose(2, 3) for x in qkv(1, 8, 64, 64)], {}, "does not take these strides or sizes"),
        ([x.expand(1, 8, 2, 64) for x in qkv(1, 8, 1, 64)], {}, "does not take these strides or sizes"),
    ],
)
def test_a_case_that_is_not_covered_goes_to_triton_and_says_why(
    machine: Machine, tensors: list[torch.Tensor], options: dict[str, Any], reason: str
) -> None:
    machine.has("flash-attn 2")
    choice = choose_attention(*tensors, **options)
    assert choice.implementation == "triton"
    assert f"flash-attn 2 {reason}" in choice.reason


@pytest.mark.parametrize(
    ("name", "chip", "head_dim", "options", "reason"),
    [
        ("flash-attn 3", 90, 256, {}, "has no deterministic gradient past head_dim 192"),
        ("flash-attn 4", 90, 64, {}, "has no deterministic gradient on Hopper"),
        ("flash-attn 4", 100, 64, {"softcap": 9.0}, "has no gradient with a softcap"),
        ("flash-attn 4", 100, 256, {}, "takes head_dim 64, 96 and 128, not 256"),
    ],
)
def test_a_generation_without_the_gradient_serves_inference_only(
    machine: Machine, name: str, chip: int, head_dim: int, options: dict[str, Any], reason: str
) -> None:
    machine.has(name)
    machine.is_a(chip)
    assert reason in choose_attention(*qkv(1, 8, 2, head_dim), **options).reason
    with torch.no_grad():
        expected = "triton" if "takes" in reason else name
        assert choose_attention(*qkv(1, 8, 2, head_dim), **options).implementation == expected


def test_a_third_generation_from_before_its_determinism_serves_inference_only(machine: Machine) -> None:
    machine.has("flash-attn 3", registers_ops=False)
    assert "from before September 2025" in choose_attention(*qkv(1, 8, 2, 64)).reason
    with torch.no_grad():
        assert choose_attention(*qkv(1, 8, 2, 64)).implementation == "flash-attn 3"


@pytest.mark.parametrize(("name", "chip"), [("flash-attn 2", 80), ("flash-attn 3", 90), ("flash-attn 4", 100)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_the_call_carries_every_option_and_gives_the_same_numbers(
    machine: Machine, name: str, chip: int, causal: bool, window: int | None
) -> None:
    machine.has(name)
    machine.is_a(chip)
    tensors = qkv(2, 9, 2, 64)
    out = attention(*tensors, causal=causal, window=window, scale=0.25)
    ((kind, arguments),) = machine.calls
    unbounded = None if name == "flash-attn 4" else -1
    sides = (unbounded, unbounded) if window is None else (2, 0 if causal else 2)
    assert kind == "dense"
    assert arguments["window_size"] == sides
    assert (arguments["causal"], arguments["softmax_scale"], arguments["softcap"]) == (causal, 0.25, 0.0)
    assert arguments["deterministic"] is True
    assert arguments["q"].shape == (2, 9, 2, 64)
    expected = reference(*tensors, causal=causal, window=window, scale=0.25)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(expected, tensors, upstream)
    )


@pytest.mark.parametrize(("name", "chip"), [("flash-attn 2", 80), ("flash-attn 3", 90), ("flash-attn 4", 100)])
def test_packed_documents_go_to_the_varlen_function(machine: Machine, name: str, chip: int) -> None:
    machine.has(name)
    machine.is_a(chip)
    tensors, options = qkv(9, 2, 64), packed(9)
    out = attention(*tensors, **options)
    ((kind, arguments),) = machine.calls
    assert kind == "packed"
    assert arguments["cu_seqlens_q"] is arguments["cu_seqlens_k"]
    assert arguments["cu_seqlens_q"].tolist() == [0, 3, 9]
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (9, 9)
    torch.testing.assert_close(out, reference(*tensors, **options))


def test_the_longest_document_is_read_where_it_is_not_given(machine: Machine) -> None:
    machine.has("flash-attn 3")
    attention(*qkv(9, 2, 64), cu_seqlens=packed(9)["cu_seqlens"])
    assert machine.calls[0][1]["max_seqlen_q"] == 6


def test_softcap_is_handed_on(machine: Machine) -> None:
    machine.has("flash-attn 3")
    attention(*qkv(1, 9, 2, 64), softcap=20.0)
    assert machine.calls[0][1]["softcap"] == 20.0


def test_autocast_brings_float32_within_reach(machine: Machine) -> None:
    machine.has("flash-attn 3")
    tensors = qkv(1, 9, 2, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_attention(*tensors).implementation == "flash-attn 3"
        assert attention(*tensors).dtype == torch.bfloat16


def test_a_second_derivative_through_flash_attn_is_refused(machine: Machine) -> None:
    machine.has("flash-attn 3")
    tensors = qkv(1, 9, 2, 64)
    out = attention(*tensors)
    (gradient, *_) = torch.autograd.grad(out.float().square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.sum(), tensors)


def test_compiled_code_calls_it_in_one_graph(machine: Machine) -> None:
    machine.has("flash-attn 2")
    machine.is_a(80)
    tensors = qkv(1, 9, 2, 64)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), reference(*tensors))
    assert machine.calls, "the stand-in was not traced"


def test_a_generation_that_compile_cannot_trace_is_passed_over_there(machine: Machine) -> None:
    machine.has("flash-attn 4")
    machine.is_a(100)
    seen = []

    def ask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(choose_attention(q, k, v))
        return q + 1

    torch.compile(ask, backend="eager")(*qkv(1, 9, 2, 64, requires_grad=False))
    assert seen[0].implementation == "triton"
    assert "cannot be traced by torch.compile" in seen[0].reason


class Broken(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise OSError("undefined symbol: _ZN3c10")


def test_broken_unrelated_and_outdated_packages_go_unused(machine: Machine) -> None:
    tensors = qkv(1, 8, 2, 64)
    machine.install("flash_attn_interface", Broken("flash_attn_interface"))
    unrelated = types.ModuleType("flash_attn.flash_attn_interface")
    machine.install("flash_attn.flash_attn_interface", unrelated)
    choice = choose_attention(*tensors)
    assert choice.implementation == "triton"
    assert "flash-attn 3 cannot be used (OSError: undefined symbol: _ZN3c10)" in choice.reason
    assert "flash-attn 2 cannot be used (AttributeError" in choice.reason
    flash_attention._found.clear()
    outdated = stand_in("flash-attn 2", machine.calls)
    outdated.flash_attn_func = lambda q, k, v, softmax_scale, causal, window_size: q  # type: ignore[attr-defined]
    machine.install("flash_attn.flash_attn_interface", outdated)
    reason = choose_attention(*tensors).reason
    assert "flash-attn 2 has no argument deterministic, softcap in this version" in reason


def test_a_package_is_looked_for_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("flash-attn 3")
    names: list[str] = []
    original = flash_attention._look_for
    monkeypatch.setattr(flash_attention, "_look_for", lambda name: names.append(name) or original(name))
    for _ in range(3):
        choose_attention(*qkv(1, 8, 2, 64))
    assert sorted(names) == sorted(set(names))
