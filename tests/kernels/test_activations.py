"""What the contract of all ops cannot see: that swiglu, geglu and relu2 compute what their names mean, in the kernel
and in the reference alike, and refuse by name what they cannot take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels import gated, geglu, relu2, swiglu
from tilewright.kernels.dispatch import use
from tilewright.kernels.launch import as_if_on

geglu_tanh = partial(geglu, approximate="tanh")
gated_ops = pytest.mark.parametrize("op", [swiglu, geglu, geglu_tanh], ids=["swiglu", "geglu", "geglu_tanh"])


@pytest.fixture(params=["triton", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def gradients(result: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the result's product with a fixed random tensor."""
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return torch.autograd.grad(result, inputs, upstream)


GATE, UP = [0.0, 1.0, -2.0, 100.0, -100.0], [3.0, 2.0, 5.0, 0.5, 4.0]


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    expected = [0.0, 2 / (1 + math.exp(-1)), -10 / (1 + math.exp(2)), 50.0, 0.0]
    torch.testing.assert_close(swiglu(torch.tensor(GATE), torch.tensor(UP)), torch.tensor(expected))


def test_geglu_is_gelu_of_the_gate_times_up() -> None:
    expected = [gate * (1 + math.erf(gate / math.sqrt(2))) / 2 * up for gate, up in zip(GATE, UP, strict=True)]
    torch.testing.assert_close(geglu(torch.tensor(GATE), torch.tensor(UP)), torch.tensor(expected))


def test_geglu_by_tanh_is_the_approximation_of_gelu_times_up() -> None:
    def gelu(x: float) -> float:
        return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    expected = [gelu(gate) * up for gate, up in zip(GATE, UP, strict=True)]
    got = geglu_tanh(torch.tensor(GATE), torch.tensor(UP))
    torch.testing.assert_close(got, torch.tensor(expected))
    assert not torch.equal(got, geglu(torch.tensor(GATE), torch.tensor(UP)))


def test_relu2_is_the_square_of_what_is_above_zero() -> None:
    x = torch.tensor([-3.0, -0.0, 0.0, 0.5, 3.0, math.inf, -math.inf, math.nan], requires_grad=True)
    y = relu2(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 0.25, 9.0, math.inf, 0.0, math.nan]), equal_nan=True)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(x, 2.0))
    torch.testing.assert_close(dx, torch.tensor([0.0, 0.0, 0.0, 2.0, 12.0, math.inf, 0.0, math.nan]), equal_nan=True)


@gated_ops
@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 254), (2000,)])
def test_a_fused_input_gives_what_its_halves_give(op: Callable[..., Any], shape: tuple[int, ...]) -> None:
    fused = torch.randn(shape, requires_grad=True)
    gate, up = (half.detach().clone().requires_grad_() for half in fused.chunk(2, dim=-1))
    together, apart = op(fused), op(gate, up)
    torch.testing.assert_close(together, apart)
    (dfused,) = gradients(together, fused)
    torch.testing.assert_close(dfused, torch.cat(gradients(apart, gate, up), dim=-1))
    assert dfused.is_contiguous()


def test_the_tanh_kernel_keeps_the_digits_that_cancel_in_the_tails(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("PyTorch's own gelu takes 1 + tanh, which has hardly a digit left at minus 5")
    gate = torch.cat([torch.linspace(-5, -3, 50), torch.linspace(3, 5, 50)]).requires_grad_()
    wide = gate.detach().double().requires_grad_()
    ours, exact = geglu_tanh(gate, torch.ones(100)), F.gelu(wide, approximate="tanh")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    (slope,), (exact_slope,) = (torch.autograd.grad(y.sum(), x) for y, x in ((ours, gate), (exact, wide)))
    torch.testing.assert_close(slope[:50].double(), exact_slope[:50], rtol=1e-5, atol=0)
    torch.testing.assert_close(slope[50:].double(), exact_slope[50:], rtol=0, atol=2.5e-7)  # about 1


@gated_ops
def test_autocast_leaves_elementwise_ops_alone(op: Callable[..., Any]) -> None:
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x).dtype == relu2(x).dtype == torch.float32
        assert torch.equal(op(x), op(x.clone()))


@gated_ops
def test_nan_in_either_half_comes_out(op: Callable[..., Any]) -> None:
    gate, up = torch.ones(4), torch.ones(4)
    gate[1] = up[2] = math.nan
    assert op(gate, up).isnan().tolist() == [False, True, True, False]


def test_a_row_may_have_more_blocks_than_a_grids_second_axis_holds() -> None:
    with as_if_on(80):
        grid, constants = gated._blocks(3, 2**31 + 1, torch.device("cpu"))
    columns = 2**31 // constants["BLOCK_COLUMNS"] + 1
    assert columns > 65_535
    assert grid == (columns * -(-3 // constants["BLOCK_ROWS"]),)


X = torch.zeros(3, 8)
HALF = X.half()
INTEGERS = torch.zeros(3, 8, dtype=torch.int64)
ELSEWHERE = torch.zeros(3, 8, device="meta")


def refused() -> Iterator[Any]:
    for op in (swiglu, geglu):
        for message, args in (
            ("gate has dtype torch.int64; it must be", (INTEGERS,)),
            ("up has dtype torch.int64; it must be", (X, INTEGERS)),
            ("gate has no dimension; it must be (…, width)", (torch.tensor(1.0),)),
            ("gate has shape (3, 7); without up its last dimension", (X[:, :7],)),
            ("up has shape (3, 4); it must be (3, 8), the shape of gate", (X, X[:, :4])),
            ("up has shape (8,); it must be (3, 8), the shape of gate", (X, X[0])),
            ("up has dtype torch.float16 and gate torch.float32", (X, HALF)),
            ("up is on meta and gate on cpu", (X, ELSEWHERE)),
        ):
            message = f"{op.__name__}: {message}"
            yield pytest.param(partial(op, *args), message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message))
    for call, message in (
        (partial(geglu, X, approximate="erf"), "geglu: approximate is 'erf'; it must be 'none' or 'tanh'"),
        (partial(relu2, INTEGERS), "relu2: x has dtype torch.int64; it must be"),
    ):
        yield pytest.param(call, message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message))


@pytest.mark.parametrize(("call", "message"), refused())
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
