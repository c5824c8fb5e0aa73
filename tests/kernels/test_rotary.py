"""What the contract cannot see of rotary: that it turns pairs by the angles of their positions, in the kernel and in
the reference alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tilewright.kernels.dispatch import use
from tilewright.kernels.rotary import rotary
from tilewright.kernels.rotary_tables import rotary_tables


@pytest.fixture(params=["triton", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


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
