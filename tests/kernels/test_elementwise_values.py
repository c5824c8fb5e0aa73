"""What the contract of all ops cannot see: that layer_norm, swiglu and rotary compute what their names mean, in the
kernel and in the reference alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch import use
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.rotary import rotary, rotary_tables
from tilewright.kernels.swiglu import swiglu


@pytest.fixture(params=["triton", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def gradients(result: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the result's product with a fixed random tensor."""
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return torch.autograd.grad(result, inputs, upstream)


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
    # float32 holds the mean to 1/2048, and the kernel loses nothing else; PyTorch is three times as far off.
    # E[x²] − E[x]² would be wrong by 8.
    tolerance = 1.1 / 2048 if implementation == "triton" else 4 / 2048
    torch.testing.assert_close(layer_norm(x).double(), exact, rtol=0, atol=tolerance)


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


def test_layer_norms_sum_alone_passes_its_gradient_to_both_terms() -> None:
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    _, summed = layer_norm(x, residual=residual)
    dx, dresidual = torch.autograd.grad(summed, (x, residual), torch.ones(3, 8))
    assert torch.equal(dx, torch.ones(3, 8))
    assert torch.equal(dresidual, torch.ones(3, 8))


def test_layer_norm_of_no_rows_has_zero_parameter_gradients() -> None:
    x, weight, bias = torch.randn(0, 8), torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = layer_norm(x, weight, bias)
    assert y.shape == (0, 8)
    assert all(torch.equal(g, torch.zeros(8)) for g in torch.autograd.grad(y.sum(), (weight, bias)))


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    gate, up = torch.tensor([0.0, 1.0, -2.0, 100.0, -100.0]), torch.tensor([3.0, 2.0, 5.0, 0.5, 4.0])
    expected = torch.tensor([0.0, 2 / (1 + torch.e**-1), -10 / (1 + torch.e**2), 50.0, 0.0])
    torch.testing.assert_close(swiglu(gate, up), expected)


@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 254), (2000,)])
def test_swiglu_of_a_fused_input_equals_that_of_its_halves(shape: tuple[int, ...]) -> None:
    fused = torch.randn(shape, requires_grad=True)
    gate, up = (half.detach().clone().requires_grad_() for half in fused.chunk(2, dim=-1))
    together, apart = swiglu(fused), swiglu(gate, up)
    torch.testing.assert_close(together, apart)
    (dfused,) = gradients(together, fused)
    torch.testing.assert_close(dfused, torch.cat(gradients(apart, gate, up), dim=-1))
    assert dfused.is_contiguous()


def complex_rotation(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair of x (tokens, heads, head_dim) as a complex number, times e^(i·angle) of its token."""
    half = angles.shape[-1]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    parts = (turned.real, turned.imag)
    return torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_multiplies_pairs_as_complex_numbers(interleaved: bool) -> None:
    q, k = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    positions = torch.tensor([0, 3, 100, 100, 7])
    angles = positions[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000^(−2i/8)
    outs = rotary(q, k, *rotary_tables(101, 8), positions=positions, interleaved=interleaved)
    for x, out in zip((q, k), outs, strict=True):
        torch.testing.assert_close(out, complex_rotation(x, angles, interleaved), rtol=1e-5, atol=1e-5)


def test_rotary_interleaved_is_the_half_layout_with_the_elements_reordered() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    tables = rotary_tables(3, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the half layout's element i stands at order[i] in the interleaved
    halves = rotary(q[..., order], k[..., order], *tables)
    for interleaved, half in zip(rotary(q, k, *tables, interleaved=True), halves, strict=True):
        torch.testing.assert_close(interleaved[..., order], half)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_makes_products_of_q_and_k_depend_on_their_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(1, 6, 1, 16), torch.randn(1, 6, 1, 16)
    tables = rotary_tables(1000, 16)
    scores = []
    for shift in (0, 1, 900):
        positions = torch.tensor([[0, 1, 2, 10, 50, 99]]) + shift
        q_out, k_out = rotary(q, k, *tables, positions=positions, interleaved=interleaved)
        scores.append(torch.einsum("bqhd,bkhd->bqk", q_out, k_out))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0], torch.einsum("bqhd,bkhd->bqk", q, k), atol=0.1)


def test_rotary_counts_positions_along_the_sequence_of_each_batch_entry() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 1, 8)
    tables = rotary_tables(4, 8)
    counted = rotary(q, k, *tables)
    given = rotary(q, k, *tables, positions=torch.arange(4).expand(2, 4))
    packed = rotary(q[1], k[1], *tables)
    for number in range(2):
        assert torch.equal(counted[number], given[number])
        assert torch.equal(counted[number][1], packed[number])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_passes_on_what_is_past_the_rotary_dim(interleaved: bool) -> None:
    q, k = torch.randn(3, 2, 10), torch.randn(3, 1, 10)
    tables = rotary_tables(3, 6)
    outs = rotary(q, k, *tables, interleaved=interleaved)
    whole = rotary(q[..., :6], k[..., :6], *tables, interleaved=interleaved)
    for x, out, turned in zip((q, k), outs, whole, strict=True):
        assert torch.equal(out[..., 6:], x[..., 6:])
        assert torch.equal(out[..., :6], turned)


def test_rotary_turns_16_bit_heads_by_float32_tables_with_one_rounding() -> None:
    q, k = torch.randn(4, 2, 32).half(), torch.randn(4, 1, 32).half()
    positions = torch.tensor([5, 2000, 4000, 4095])
    tables = rotary_tables(4096, 32)
    outs = rotary(q, k, *tables, positions=positions)
    exact = rotary(q.float(), k.float(), *tables, positions=positions)
    for out, wide in zip(outs, exact, strict=True):
        assert out.dtype == torch.float16
        assert torch.equal(out, wide.half())


def test_rotary_returns_new_tensors() -> None:
    q, k = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    outs = rotary(q, k, *rotary_tables(2, 2))
    assert {out.untyped_storage().data_ptr() for out in outs}.isdisjoint(
        {x.untyped_storage().data_ptr() for x in (q, k)}
    )


def test_rotary_tables_hold_the_cosines_of_float64_angles() -> None:
    cos, sin = rotary_tables(100_001, 6, base=500_000.0)
    assert cos.shape == sin.shape == (100_001, 3)
    angle = 100_000 * 500_000.0 ** (-2 / 6)
    # Rounded to float32, the angle alone could be off by 6e-5.
    assert abs(cos[100_000, 1].item() - math.cos(angle)) < 6e-8
    assert abs(sin[100_000, 1].item() - math.sin(angle)) < 6e-8
    assert torch.equal(cos[0], torch.ones(3))
    assert torch.equal(sin[0], torch.zeros(3))
    assert rotary_tables(2, 4, dtype=torch.float16)[0].dtype == torch.float16
