"""What the contract cannot see of attention: values on the boundary of documents, and every refused argument."""

import pytest
import torch

from tilewright.kernels.attention import _documents, attention, reference
from tilewright.kernels.dispatch import use


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
    with use("reference"):
        out = attention(*tensors, causal=causal, cu_seqlens=starts)
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
    x = torch.zeros(int(starts[-1]), 1, 1)
    padded = {parts[0].shape[2] for _, _, parts in _documents(starts, True, x)}
    assert len(padded) <= 8 * 6
    waste = sum(parts[0].shape[2] - length for _, length, parts in _documents(starts, True, x)) / x.shape[0]
    assert waste < 0.15


def test_a_causal_token_depends_on_no_later_one() -> None:
    q, k, v = qkv(1, 70, 2, 16)
    before = attention(q, k, v)
    with torch.no_grad():
        k[:, 40:] += 5.0
        v[:, 40:] -= 3.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (qkv(1, 4, 3, 8, kv_heads=2), {}, "q has 3 heads, which the 2 heads of k do not divide"),
        (qkv(1, 4, 2, 300), {}, "q has head_dim 300; it must be between 1 and 256"),
        (qkv(4, 2, 8), {}, r"q has shape \(4, 2, 8\); it must be \(batch, seq, heads, head_dim\)"),
        (qkv(1, 4, 2, 8), {"window": 3}, "window is not supported yet"),
        (qkv(1, 4, 2, 8), {"max_seqlen": 3}, "max_seqlen is given without cu_seqlens"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens is torch.int64 of shape \(2,\)"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "rise from 0 to the 4 tokens of q"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([0, 3, 2, 4], dtype=torch.int32)}, "never fall"),
        (
            qkv(4, 2, 8),
            {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 3},
            "max_seqlen is 3 but cu_seqlens holds a document of 4",
        ),
        ([x.int() for x in qkv(1, 4, 2, 8)], {}, "q has dtype torch.int32"),
        ([*qkv(1, 4, 2, 8)[:2], torch.randn(1, 4, 2, 8).half()], {}, "v has dtype torch.float16 and q torch.float32"),
        ([*qkv(1, 4, 2, 8)[:2], torch.randn(1, 5, 2, 8)], {}, "they must be the same"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    arguments: list[torch.Tensor], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options)  # type: ignore[arg-type]
