"""What the contract cannot see of attention: what options mean, which blocks are skipped, every refused argument."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels.attention import SPEC, attention, reference
from tilewright.kernels.dispatch import use

MODULE = sys.modules["tilewright.kernels.attention"]


def qkv(*shape: int, kv_heads: int | None = None) -> list[torch.Tensor]:
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return [torch.randn(s, requires_grad=True) for s in (shape, kv_shape, kv_shape)]


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
        (qkv(1, 4, 2, 8), {"window": 0}, "window is 0; it must be a whole number of keys, at least 1"),
        (qkv(1, 4, 2, 8), {"window": -3}, "window is -3"),
        (qkv(1, 4, 2, 8), {"window": 2.0}, "window is 2.0"),
        (qkv(1, 4, 2, 8), {"softcap": 0.0}, "softcap is 0.0; it must be finite and above 0"),
        (qkv(1, 4, 2, 8), {"softcap": -5.0}, "softcap is -5.0"),
        (qkv(1, 4, 2, 8), {"softcap": float("nan")}, "softcap is nan"),
        (qkv(1, 4, 2, 8), {"scale": float("inf")}, "scale is inf; it must be finite"),
        (
            qkv(1, 4, 2, 8),
            {"sinks": torch.zeros(3)},
            r"sinks has shape \(3,\); it must be \(2,\), one score for each head",
        ),
        (qkv(1, 4, 2, 8), {"sinks": torch.zeros(2, dtype=torch.int32)}, "sinks has dtype torch.int32"),
        (qkv(1, 4, 2, 8), {"sinks": torch.zeros(2, device="meta")}, "sinks is on meta and q on cpu"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([1, 4], dtype=torch.int32)}, "rise from 0 to the 4 tokens of q"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, r"int32 of shape \(documents \+ 1,\)"),
        (qkv(4, 2, 8), {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": -1}, "max_seqlen is -1"),
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


def brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Query by query and key by key, from the definition, in float64: out and lse for one head, (seq, head_dim)."""
    scale, softcap, sink = options["scale"], options["softcap"], options["sink"]
    outs, lses = [], []
    for i in range(len(q)):
        place = i + len(k) - len(q)
        exps, values = [], []
        for j in range(len(k)):
            near = place - options["window"] < j < place + options["window"]
            if near and (j <= place or not options["causal"]):
                score = scale * float(q[i] @ k[j])
                exps.append(torch.tensor(softcap * torch.tanh(torch.tensor(score / softcap)).item()).double().exp())
                values.append(v[j])
        total = sum(exps, torch.tensor(sink).double().exp())
        outs.append(sum((e * x for e, x in zip(exps, values, strict=True)), torch.zeros_like(v[0])) / total)
        lses.append(total.log())
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(9, 9), (5, 12), (12, 5)])
def test_window_softcap_and_sinks_mean_what_their_definitions_say(
    mode: str, causal: bool, seq_q: int, seq_k: int
) -> None:
    q, k, v = (torch.randn(1, seq, 2, 8, dtype=torch.float64) for seq in (seq_q, seq_k, seq_k))
    sinks = torch.tensor([0.7, -1.0], dtype=torch.float64)
    options = {"causal": causal, "window": 3, "softcap": 2.0, "scale": 0.9}
    dtype = torch.float64 if mode == "reference" else torch.float32
    with use(mode):
        out, lse = attention(*(x.to(dtype) for x in (q, k, v)), sinks=sinks.to(dtype), **options, return_lse=True)
    for head in range(2):
        expected, expected_lse = brute_force(*(x[0, :, head] for x in (q, k, v)), **options, sink=float(sinks[head]))
        torch.testing.assert_close(out[0, :, head].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[0, head].double(), expected_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_outside_the_window_is_never_read(causal: bool) -> None:
    """Forward and backward stay finite with NaN in all keys and queries of blocks that the band does not touch."""
    tensors = [x.detach().clone() for x in qkv(1, 800, 1, 16)]
    query, window = 400, 30
    # A block each way, and the window: so far does the query see, and so far again does what shares its keys.
    reach = 2 * (128 + window)
    for x in tensors:
        x[:, : query - reach] = float("nan")
        x[:, query + reach :] = float("nan")
    q, k, v = (x.requires_grad_() for x in tensors)
    out = attention(q, k, v, window=window, causal=causal)
    assert out[0, query].isfinite().all()
    upstream = torch.zeros_like(out)
    upstream[0, query] = 1.0
    for gradient in torch.autograd.grad(out, (q, k, v), upstream):
        assert gradient[0, query].isfinite().all()
        assert gradient[0, query].any()


def test_a_window_as_long_as_the_sequence_changes_nothing() -> None:
    tensors = qkv(1, 70, 2, 16)
    assert torch.equal(attention(*tensors, window=70), attention(*tensors))
    assert not torch.equal(attention(*tensors, window=69), attention(*tensors))


def test_sinks_of_minus_infinity_change_nothing() -> None:
    q, k, v = qkv(1, 9, 2, 16)
    tensors = (q, k[:, :4], v[:, :4])  # some queries see nothing
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    out, lse = attention(*tensors, sinks=sinks, return_lse=True)
    expected, expected_lse = attention(*tensors, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    (gradient,) = torch.autograd.grad(out.sum() + lse[:, :, 5:].sum(), sinks)
    assert torch.equal(gradient, torch.zeros(2))


def test_a_query_that_sees_only_its_sink_gives_zeros_and_the_sinks_score() -> None:
    q, k, v = qkv(1, 8, 2, 16)
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    out, lse = attention(q, k[:, :3], v[:, :3], sinks=sinks, return_lse=True)
    assert torch.equal(out[:, :5], torch.zeros(1, 5, 2, 16))
    torch.testing.assert_close(lse[0, :, :5], sinks[:, None].expand(2, 5))
    # Of those five queries, each passes its upstream gradient of lse on whole.
    (gradient,) = torch.autograd.grad(lse[:, :, :5].sum(), sinks)
    torch.testing.assert_close(gradient, torch.full((2,), 5.0))


@pytest.mark.parametrize("softcap", [0.5, 5.0, 500.0])
def test_capped_scores_have_small_relative_error_at_every_size(softcap: float) -> None:
    """One key: lse is the capped score itself. exp alone would lose the small ones to cancellation."""
    scores = torch.cat([torch.logspace(-6, 3, 40), -torch.logspace(-6, 3, 40)])
    q = torch.zeros(1, 80, 1, 8)
    q[0, :, 0, 0] = scores
    k = torch.zeros(1, 1, 1, 8)
    k[..., 0] = 1.0
    _, lse = attention(q, k, k, softcap=softcap, scale=1.0, causal=False, return_lse=True)
    expected = softcap * torch.tanh(scores.double() / softcap)
    torch.testing.assert_close(lse[0, 0].double(), expected, rtol=1e-6, atol=0)


def test_more_sequences_than_a_grids_narrow_axes_take_go_into_the_wide_one(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("_forward", "_backward_delta", "_backward_dkv", "_backward_dq"):
        monkeypatch.setattr(MODULE, name, Recorder())
    for shape in ((70_000, 1, 2, 8), (1, 1, 70_000, 8)):
        tensors = qkv(*shape)
        torch.autograd.grad(attention(*tensors), tensors, torch.ones(shape))
    assert grids[0] == (140_000,)
    assert grids[4] == (70_000,)
    assert all(len(grid) == 1 for grid in grids)
    with pytest.raises(ValueError, match="split the batch"):
        MODULE._programs(2**20, 32, 64)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 3.0}, {"sinks": torch.randn(4)}])
@pytest.mark.parametrize("causal", [True, False])
def test_the_cpu_path_of_packed_documents_takes_every_option(options: dict[str, Any], causal: bool) -> None:
    tensors = qkv(40, 4, 16, kv_heads=2)
    starts = torch.tensor([0, 15, 15, 40], dtype=torch.int32)
    with use("reference"):
        out, lse = attention(*tensors, causal=causal, cu_seqlens=starts, return_lse=True, **options)
        assert torch.allclose(out, attention(*tensors, causal=causal, cu_seqlens=starts, **options), atol=1e-6)
    for start, end in ((0, 15), (15, 40)):
        alone, alone_lse = reference(*(x[None, start:end] for x in tensors), causal=causal, return_lse=True, **options)
        torch.testing.assert_close(out[start:end], alone[0])
        torch.testing.assert_close(lse[:, start:end], alone_lse[0])


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 3.0}, {"return_lse": True}])
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (3, 4, 0, 8)])
def test_nothing_in_gives_nothing_out_on_the_cpu_path(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    tensors = qkv(*shape, kv_heads=2)
    with use("reference"):
        out = attention(*tensors, **options)
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, tensors, strict=True))


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_queries_without_any_key_give_zeros(mode: str) -> None:
    q, (k, v) = qkv(2, 3, 2, 8)[0], qkv(2, 0, 2, 8)[1:]
    with use(mode):
        assert torch.equal(attention(q, k, v, causal=False), torch.zeros(2, 3, 2, 8))
        assert torch.equal(attention(q, k, v), torch.zeros(2, 3, 2, 8))


def test_the_starts_of_documents_may_lie_apart_in_memory() -> None:
    tensors = qkv(9, 2, 8)
    apart = torch.tensor([0, 77, 4, 77, 9], dtype=torch.int32)[::2]
    assert torch.equal(attention(*tensors, cu_seqlens=apart), attention(*tensors, cu_seqlens=apart.contiguous()))


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_autocast_computes_in_its_dtype_as_pytorchs_attention_does(mode: str) -> None:
    tensors = qkv(1, 9, 2, 16)
    with torch.autocast("cpu", torch.float16), use(mode):
        out = attention(*tensors)
        theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), is_causal=True).transpose(1, 2)
    assert out.dtype == theirs.dtype == torch.float16
    torch.testing.assert_close(out, theirs, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_packed_attention_compiles_without_the_longest_document_and_with_every_option() -> None:
    tensors = qkv(20, 2, 8)
    starts = torch.tensor([0, 12, 20], dtype=torch.int32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v, cu_seqlens=starts, window=4, softcap=3.0, sinks=sinks)
        assert isinstance(out, torch.Tensor)
        return out

    sinks = torch.randn(2, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = [*tensors, sinks]
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(call(*inputs).sum(), inputs))


def test_the_count_of_operations_is_four_per_visible_pair_and_dimension() -> None:
    for sample in SPEC.samples(torch.device("cpu"), torch.float32):
        options = {name: sample.options.get(name) for name in ("causal", "window")}
        causal = options["causal"] is not False
        q, k = sample.tensors["q"], sample.tensors["k"]
        starts = sample.tensors.get("cu_seqlens")
        spans = [(q.shape[1], k.shape[1])] * len(q) if starts is None else [(n, n) for n in starts.diff().tolist()]
        pairs = sum(int(MODULE._seen_by_place(*s, causal, options["window"], q.device).sum()) for s in spans)
        assert SPEC.work(sample).forward.flops == 4 * pairs * q.shape[-2] * q.shape[-1], sample.label
