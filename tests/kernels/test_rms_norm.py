"""What the contract cannot see of RMSNorm: gradients that are not asked for, and every refused argument."""

import pytest
import torch

from tilewright.kernels.rms_norm import reference, rms_norm


@pytest.mark.parametrize("width", [48, 8200])
def test_float32_weights_keep_their_gradient_in_float32_beside_half_precision_rows(width: int) -> None:
    x, weight = torch.randn(5, width).half().requires_grad_(), torch.randn(width, requires_grad=True)
    upstream = torch.randn(5, width).half()
    dx, dweight = torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream)
    assert (dx.dtype, dweight.dtype) == (torch.float16, torch.float32)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(reference(exact_x, exact_weight), exact_weight, upstream.double())[0]
    # Were it summed or stored in float16, it would be off by a thousandth.
    torch.testing.assert_close(dweight.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_sum_alone_passes_through_unchanged() -> None:
    x, weight, residual = (torch.randn(shape, requires_grad=True) for shape in ((4, 8), (8,), (4, 8)))
    _, summed = rms_norm(x, weight, residual=residual)
    upstream = torch.randn(4, 8)
    dx, dweight, dresidual = torch.autograd.grad(summed, (x, weight, residual), upstream, allow_unused=True)
    assert torch.equal(dx, upstream)
    assert torch.equal(dresidual, upstream)
    assert dweight is None


def test_the_gradient_of_the_normalised_rows_alone_is_that_of_the_reference() -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((4, 8), (8,), (4, 8))]
    upstream = torch.randn(4, 8)
    gradients = [
        torch.autograd.grad(norm(inputs[0], inputs[1], residual=inputs[2])[0], inputs, upstream)
        for norm in (rms_norm, reference)
    ]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x has shape \(\); it must be \(…, width\)"),
        ({"x": torch.ones(2, 0)}, r"x has shape \(2, 0\); it must be \(…, width\) with a width of at least 1"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, r"x has dtype torch.int64"),
        ({"x": torch.ones(2, 8), "weight": torch.ones(7)}, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(3, 8)}, r"residual has shape \(3, 8\); it must be \(2, 8\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(2, 8).half()}, r"residual has dtype torch.float16 and x"),
        (
            {"x": torch.ones(2, 8), "weight": torch.ones(8).half()},
            r"weight has dtype torch.float16 and x torch.float32",
        ),
        ({"x": torch.ones(2, 8), "weight": torch.ones(8, device="meta")}, r"weight is on meta and x on cpu"),
        ({"x": torch.ones(2, 8), "eps": -1e-6}, r"eps is -1e-06; it must be at least 0"),
        ({"x": torch.ones(2, 8), "eps": float("nan")}, r"eps is nan; it must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(**arguments)
