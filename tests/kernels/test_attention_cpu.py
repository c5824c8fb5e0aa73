"""Packed attention on CPU: documents that are padded together, and the C++ that takes them where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tilewright.kernels import attention_cpu
from tilewright.kernels.attention import reference
from tilewright.kernels.attention_cpu import _documents
from tilewright.kernels.dispatch import use


@pytest.fixture(autouse=True)
def nothing_demanded(triton_kernels: None) -> Iterator[None]:
    with use("auto"):
        yield


def qkv(*shape: int, kv_heads: int | None = None) -> list[torch.Tensor]:
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return [torch.randn(s, requires_grad=True) for s in (shape, kv_shape, kv_shape)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(33, 0, 1, 70, 200), (5,)])
def test_the_cpu_path_of_packed_documents_gives_what_each_gives_alone(causal: bool, lengths: tuple[int, ...]) -> None:
    """It pads documents to a few lengths; forward and gradients must not show it."""
    tensors = qkv(sum(lengths), 4, 16, kv_heads=2)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    upstream = torch.randn(sum(lengths), 4, 16)
    out = reference(*tensors, causal=causal, cu_seqlens=starts)
    gradients = torch.autograd.grad(out, tensors, upstream)
    alone = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        if end > start:
            alone.append(reference(*(x[None, start:end] for x in tensors), causal=causal)[0])
    expected = torch.cat(alone)
    expected_gradients = torch.autograd.grad(expected, tensors, upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_documents_of_all_lengths_are_padded_to_a_few() -> None:
    starts = torch.arange(1, 1025).cumsum(0).to(torch.int32)
    groups = list(_documents(starts, True))
    assert len(groups) <= 8 * 6
    assert sorted((span.start, span.stop) for group in groups for span in group.spans) == list(
        itertools.pairwise(starts.tolist())
    )
    padded = sum(group.length * len(group.spans) for group in groups)
    assert padded / int(starts[-1] - starts[0]) < 1.15


_needs_bfloat16 = pytest.mark.skipif(
    attention_cpu._compiled() is None, reason="no C++ compiler, or a processor that does not multiply bfloat16 numbers"
)


@_needs_bfloat16
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "scale"),
    [(4, 4, 16, 0.25), (4, 2, 64, 0.125), (3, 1, 80, 0.3), (2, 2, 48, 0.2), (2, 1, 128, 0.1)],
)
def test_documents_in_bfloat16_are_as_exact_as_with_pytorchs_attention(
    heads: int, kv_heads: int, head_dim: int, scale: float, causal: bool
) -> None:
    """Scores up to 20, to whose last digits bfloat16 cannot hold them; around the sizes of blocks; of one projection,
    whose heads lie apart."""
    lengths = (1, 63, 0, 64, 130, 128, 300, 65, 2)
    widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    projected = (1.5 * torch.randn(sum(lengths), sum(widths))).bfloat16()
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    upstream = torch.randn(sum(lengths), heads, head_dim).bfloat16()

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = projected.to(dtype).requires_grad_()
        q, k, v = (x.unflatten(1, (-1, head_dim)) for x in leaf.split(widths, 1))
        out = reference(q, k, v, causal=causal, scale=scale, cu_seqlens=starts)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(dtype))
        return [out.detach(), *gradient.split(widths, 1)]

    expected = results(torch.float64)

    def errors() -> list[float]:
        pairs = zip(results(torch.bfloat16), expected, strict=True)
        return [float((got - right).norm() / right.norm()) for got, right in pairs]

    ours = errors()
    with use("reference"):
        others = errors()
    assert others != ours, "both took the same path"
    for error, other in zip(ours, others, strict=True):
        assert error < 1.05 * other
        assert error < 0.01


@_needs_bfloat16
@pytest.mark.parametrize("causal", [True, False])
def test_documents_in_bfloat16_keep_to_the_largest_score_where_scores_are_huge(causal: bool) -> None:
    """Hundreds of thousands: far beyond what an exponential can take."""
    tensors = [x.bfloat16().detach().requires_grad_() for x in qkv(300, 4, 64)]
    exact = [x.detach().double() for x in tensors]
    starts = torch.tensor([0, 300], dtype=torch.int32)
    out, expected = (reference(*x, causal=causal, scale=2.0**15, cu_seqlens=starts) for x in (tensors, exact))
    gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert (out - expected).norm() / expected.norm() < 0.01
    assert all(gradient.isfinite().all() for gradient in gradients)


@_needs_bfloat16
def test_a_number_that_is_none_spoils_its_document_alone() -> None:
    tensors = [x.bfloat16().detach() for x in qkv(200, 2, 32)]
    tensors[1][30] = torch.nan
    out = reference(*tensors, cu_seqlens=torch.tensor([0, 70, 200], dtype=torch.int32))
    assert out[30:70].isnan().all()
    assert out[:30].isfinite().all()
    assert out[70:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [[0, 20], [0, 41], [1, 40], [0, 30, 20, 40], [0, 2**31 - 1, 40]])
def test_compiled_attention_refuses_documents_that_do_not_fit(starts: list[int], dtype: torch.dtype) -> None:
    """Their values are not there to be checked while it is traced."""
    tensors = [x.detach().to(dtype) for x in qkv(40, 2, 16)]
    compiled = torch.compile(lambda *x: reference(*x[:3], cu_seqlens=x[3]), backend="eager", dynamic=False)
    with pytest.raises(ValueError, match="must rise from 0 to the 40 tokens"):
        compiled(*tensors, torch.tensor(starts, dtype=torch.int32))
