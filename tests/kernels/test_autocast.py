"""Autocast reaches the ops as it reaches their counterparts in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels import attention, cross_entropy, layer_norm, linear_cross_entropy, rms_norm, swiglu
from tilewright.kernels.autocast import to_float32, to_lower_precision
from tilewright.kernels.dispatch import use

X = torch.randn(4, 8)
Q = torch.randn(1, 5, 2, 8)
TARGETS = torch.tensor([1, 2, 0, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cpu_each_op_returns_the_dtype_of_its_counterpart(dtype: torch.dtype) -> None:
    weight = torch.ones(8)
    head = torch.randn(6, 8)
    pairs = {
        "attention": (
            lambda: attention(Q, Q, Q),
            lambda: F.scaled_dot_product_attention(*(Q.transpose(1, 2),) * 3, is_causal=True),
        ),
        "rms_norm": (lambda: rms_norm(X, weight), lambda: F.rms_norm(X, (8,), weight)),
        "layer_norm": (lambda: layer_norm(X, weight), lambda: F.layer_norm(X, (8,), weight)),
        "cross_entropy": (lambda: cross_entropy(X, TARGETS), lambda: F.cross_entropy(X, TARGETS)),
        "linear_cross_entropy": (
            lambda: linear_cross_entropy(X, head, TARGETS),
            lambda: F.cross_entropy(F.linear(X, head), TARGETS),
        ),
        "swiglu": (lambda: swiglu(X, X), lambda: F.silu(X) * X),
    }
    with use("reference"), torch.autocast("cpu", dtype=dtype):
        for name, (ours, theirs) in pairs.items():
            assert ours().dtype == theirs().dtype, name


def test_matrix_products_run_in_the_low_precision_and_gradients_come_back_in_the_inputs() -> None:
    q = Q.clone().requires_grad_()
    with use("reference"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, q, q)
    assert torch.equal(out, attention_of(Q.bfloat16()))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def attention_of(q: torch.Tensor) -> torch.Tensor:
    with use("reference"):
        return attention(q, q, q)


class OnCuda(torch.Tensor):
    """A CPU tensor that says it stands on a GPU."""

    is_cuda = True


def test_norms_are_raised_to_float32_under_autocast_on_cuda_alone() -> None:
    on_cuda, on_cpu = X.half().as_subclass(OnCuda), X.half()
    assert to_float32(on_cuda)[0].dtype == torch.float16
    torch.set_autocast_enabled("cuda", True)
    try:
        raised, untouched, none, exact = to_float32(on_cuda, on_cpu, None, X.double().as_subclass(OnCuda))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert raised.dtype == torch.float32
    assert untouched.dtype == torch.float16
    assert none is None
    assert exact.dtype == torch.float64


def test_float64_and_integers_are_left_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert to_lower_precision(X)[0].dtype == torch.bfloat16
        assert to_lower_precision(X.double())[0].dtype == torch.float64
        assert to_lower_precision(TARGETS)[0].dtype == torch.int64
    assert to_lower_precision(X)[0] is X
