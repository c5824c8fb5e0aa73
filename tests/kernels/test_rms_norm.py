"""What the contract cannot see of RMSNorm: weights of another dtype, and every refused argument."""

import pytest
import torch

from tilewright.kernels.rms_norm import reference, rms_norm


@pytest.mark.parametrize("width", [48, 8200])
def test_float32_weights_serve_half_precision_rows_and_keep_their_gradient_in_float32(width: int) -> None:
    x, weight = torch.randn(5, width).half().requires_grad_(), torch.randn(width, requires_grad=True)
    upstream = torch.randn(5, width).half()
    y = rms_norm(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float16, torch.float16, torch.float32)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = reference(exact_x, exact_weight)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (exact_x, exact_weight), upstream.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-3, atol=2e-3)
    # Were it summed or stored in float16, it would be off by a thousandth.
    torch.testing.assert_close(dweight.double(), exact_dweight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x has no dimension"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, r"x has dtype torch.int64"),
        ({"x": torch.ones(2, 8), "weight": torch.ones(7)}, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(3, 8)}, r"residual has shape \(3, 8\); it must be \(2, 8\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(2, 8).half()}, r"residual has dtype torch.float16 and x"),
        (
            {"x": torch.ones(2, 8), "weight": torch.ones(8).half()},
            r"weight has dtype torch.float16 and x torch.float32",
        ),
        ({"x": torch.ones(2, 8), "weight": torch.ones(8, device="meta")}, r"weight is on meta and x on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**tensors)
