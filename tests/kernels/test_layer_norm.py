"""What the contract cannot see of LayerNorm: that it is PyTorch's, rows far from zero, and every refused argument."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch import use
from tilewright.kernels.layer_norm import layer_norm


@pytest.fixture(params=["triton", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def gradients(result: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the result's product with a fixed random tensor."""
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return torch.autograd.grad(result, inputs, upstream)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("width", [48, 8200])
def test_layer_norm_is_pytorchs_with_all_its_gradients(width: int) -> None:
    x, weight, bias = (torch.randn(*shape, width, requires_grad=True) for shape in ((5,), (), ()))
    ours = layer_norm(x, weight, bias, eps=1e-3)
    theirs = F.layer_norm(x, (width,), weight, bias, 1e-3)
    torch.testing.assert_close(ours, theirs)
    for got, expected in zip(gradients(ours, x, weight, bias), gradients(theirs, x, weight, bias), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [1000, 9001])
def test_layer_norm_keeps_the_digits_of_small_deviations_from_a_large_mean(width: int, implementation: str) -> None:
    x = 10_000 + torch.randn(64, width)
    exact = F.layer_norm(x.double(), (width,))
    # float32 holds a mean to 1/2048. A row in one block keeps the digits below that in its deviations; one in several
    # rounds its blocks' means and its own. PyTorch is twice as far off, and E[x²] − E[x]² would be wrong by 8.
    tolerance = {"reference": 4 / 2048, "triton": 2e-6 if width == 1000 else 2 / 2048}[implementation]
    torch.testing.assert_close(layer_norm(x).double(), exact, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("width", [48, 8200])
def test_layer_norm_takes_float32_parameters_beside_16_bit_x(width: int) -> None:
    x = torch.randn(5, width).half().requires_grad_()
    weight, bias = (torch.randn(width, requires_grad=True) for _ in range(2))
    ours = layer_norm(x, weight, bias)
    assert ours.dtype == torch.float16
    theirs = F.layer_norm(x.float(), (width,), weight, bias)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-3)
    dx, dweight, dbias = gradients(ours, x, weight, bias)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (torch.float16, torch.float32, torch.float32)
    upstream_rounded = theirs + (ours.float() - theirs).detach()
    for got, expected in zip((dx, dweight, dbias), gradients(upstream_rounded.half(), x, weight, bias), strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("width", [1000, 4097, 20000])
def test_rows_a_thousand_deviations_from_zero_are_normalised_to_float32_precision(width: int) -> None:
    x = 1000 + torch.randn(2, width)
    exact = F.layer_norm(x.double(), (width,))
    # Half the spacing of float32 at 1000, to which the mean is rounded, is 3e-5. E[x²] − E[x]² would be off by 3e-2.
    torch.testing.assert_close(layer_norm(x).double(), exact, rtol=1e-6, atol=3.5e-5)


def test_a_constant_row_is_normalised_to_the_bias() -> None:
    bias = torch.randn(9000)
    y = layer_norm(torch.full((2, 9000), 123.456), torch.randn(9000), bias)
    torch.testing.assert_close(y, bias.expand(2, 9000), rtol=0, atol=2e-2)  # 1/sqrt(eps) × a rounding error of the mean


def test_the_gradient_of_the_sum_alone_passes_through_unchanged() -> None:
    x, weight, bias, residual = (torch.randn(shape, requires_grad=True) for shape in ((4, 8), (8,), (8,), (4, 8)))
    _, summed = layer_norm(x, weight, bias, residual=residual)
    upstream = torch.randn(4, 8)
    gradients = torch.autograd.grad(summed, (x, residual, weight, bias), upstream, allow_unused=True)
    assert torch.equal(gradients[0], upstream)
    assert torch.equal(gradients[1], upstream)
    assert gradients[2:] == (None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x has shape \(\); it must be \(…, width\)"),
        ({"x": torch.ones(2, 0)}, r"x has shape \(2, 0\); it must be \(…, width\) with a width of at least 1"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, r"x has dtype torch.int64"),
        ({"x": torch.ones(2, 8), "weight": torch.ones(2, 8)}, r"weight has shape \(2, 8\); it must be \(8,\)"),
        ({"x": torch.ones(2, 8), "bias": torch.ones(7)}, r"bias has shape \(7,\); it must be \(8,\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(8)}, r"residual has shape \(8,\); it must be \(2, 8\)"),
        ({"x": torch.ones(2, 8), "residual": torch.ones(2, 8).half()}, r"residual has dtype torch.float16 and x"),
        ({"x": torch.ones(2, 8), "bias": torch.ones(8).half()}, r"bias has dtype torch.float16 and x torch.float32"),
        ({"x": torch.ones(2, 8), "bias": torch.ones(8, device="meta")}, r"bias is on meta and x on cpu"),
        ({"x": torch.ones(2, 8), "eps": -1.0}, r"eps is -1.0; it must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer_norm: {message}"):
        layer_norm(**arguments)


def test_a_nan_row_leaves_the_gradients_of_the_others_alone() -> None:
    """Wide 16-bit rows pass through the backward pass one after the other, in the same program."""
    x, dy = (torch.randn(6, 8208).bfloat16() for _ in range(2))
    weight, bias = torch.randn(8208).bfloat16(), torch.randn(8208).bfloat16()

    def dx(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone().requires_grad_()
        with use("triton"):
            return torch.autograd.grad(layer_norm(rows, weight, bias), rows, dy)[0]

    broken = x.clone()
    broken[1, 5] = torch.nan
    others = [0, 2, 3, 4, 5]
    assert torch.equal(dx(broken)[others], dx(x)[others])
