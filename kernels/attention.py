"""Scaled dot-product attention, never holding the score matrix (Dao 2023, FlashAttention-2, arXiv:2307.08691).

For each query i over the keys j that it may see, with s_ij = scale · q_i · k_j:

    lse_i = log Σ_j exp(s_ij)        p_ij = exp(s_ij − lse_i)        out_i = Σ_j p_ij v_j

Backward, for an upstream gradient g of out and h of lse, with D_i = g_i · out_i − h_i:

    dv_j = Σ_i p_ij g_i                 ds_ij = p_ij (g_i · v_j − D_i)
    dq_i = scale Σ_j ds_ij k_j          dk_j = scale Σ_i ds_ij q_i

Which keys query i sees follows from its place p_i = i + seq_k − seq_q, aligned at the bottom right: the last query
stands at the last key. Causal: j ≤ p_i. With a window w, causal: p_i − w < j ≤ p_i; not causal: |p_i − j| < w
(arXiv:2004.05150). A query that sees no key gives zeros, and lse −∞ where it has no sink.

Softcap c (Gemma 2, arXiv:2408.00118): c · tanh(s_ij / c) takes the place of s_ij, and ds_ij is multiplied by
1 − tanh²(s_ij / c).

Sinks (gpt-oss, arXiv:2508.10925): each head h has one learned score more, that of a key without a value:

    lse_i = log (exp(sink_h) + Σ_j exp(s_ij))        dsink_h = −Σ_i exp(sink_h − lse_i) D_i

Shapes: q (batch, seq_q, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim), where kv_heads divides heads
and query head h reads key head h // (heads / kv_heads). Packed: (total_tokens, heads, head_dim) with the start of each
document in `cu_seqlens`; no query sees another document, and queries and keys are the same tokens.

Numerics: scores, softmax and all sums are float32; the probabilities are rounded to the inputs' dtype before they meet
v, as the tensor cores want. The backward pass is two kernels, one that owns each dk and dv block and one that owns each
dq block: no atomics, so two runs agree to the bit. Blocks that the mask empties are skipped, and only those that the
mask cuts through, or that end a sequence, are masked at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import flash_attention
from tilewright.kernels.attention_cpu import packed_cpu
from tilewright.kernels.autocast import to_lower_precision
from tilewright.kernels.checks import (
    check_float,
    check_same,
    check_shape,
    check_starts,
    check_tensors,
    is_number,
    is_whole,
)
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import MODELS, batches
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import accumulation_dtype

if HAS_TRITON:
    import triton
    import triton.language as tl


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from each query to the keys that it may see.

    Args:
        q: (batch, seq_q, heads, head_dim), or (total_tokens, heads, head_dim) with `cu_seqlens`; head_dim up to 256.
        k, v: (batch, seq_k, kv_heads, head_dim), or (total_tokens, kv_heads, head_dim); kv_heads divides heads.
        causal: query i sees keys up to i + seq_k − seq_q only.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        window: how many keys a causal query sees at most, its own included; if not causal, query and key must be less
            than this apart. At least 1.
        softcap: bound of the scaled scores, above 0: each becomes softcap · tanh(score / softcap).
        sinks: (heads,), learned scores that take part in each head's softmax without a value; q's dtype or float32.
        cu_seqlens: (documents + 1,) int32, where each document starts, then total_tokens; for packed inputs, whose
            queries and keys are the same tokens. Its values are checked on CPU only.
        max_seqlen: the longest document, or an upper bound; read from `cu_seqlens` if None, which waits for the device.
        return_lse: also return the log-sum-exp of each query's scores, its sink included.

    Returns:
        out like q; with `return_lse` (out, lse), lse float32 of shape (batch, heads, seq_q), or (heads, total_tokens).

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    q, k, v = to_lower_precision(q, k, v)
    _check(q, k, v, sinks, cu_seqlens, max_seqlen)
    _check_options(scale, window, softcap)
    cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
    choice = flash_attention.choose(q, k, v, causal, window, softcap, sinks, cu_seqlens, return_lse)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
    if choice.implementation == "reference":
        return reference(q, k, v, **options, sinks=sinks, cu_seqlens=cu_seqlens, return_lse=return_lse)
    if cu_seqlens is None:
        max_seqlen = q.shape[1]
    elif max_seqlen is None:
        # torch.compile knows no values; all tokens are an upper bound too, only that more programs find nothing to do.
        max_seqlen = q.shape[0] if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
    if choice.implementation != "triton":
        options |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return flash_attention.call(choice.implementation, q, k, v, **options)
    out, lse = _forward_op(q, k, v, sinks, cu_seqlens, max_seqlen, causal, scale, window, softcap)
    return (out, lse) if return_lse else out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> None:
    check_tensors("attention", q=q, k=k, v=v)
    check_float("attention", q=q, k=k, v=v, sinks=sinks)
    check_same("attention", "q", q, k=k, v=v)
    if cu_seqlens is not None:
        check_tensors("attention", cu_seqlens=cu_seqlens)
    layout = "(batch, seq, heads, head_dim)" if cu_seqlens is None else "(total_tokens, heads, head_dim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != (4 if cu_seqlens is None else 3):
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}; it must be {layout}")
    if k.shape != v.shape:
        raise ValueError(f"attention: k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be the same")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention: q has head_dim {q.shape[-1]} and k {k.shape[-1]}; they must be the same")
    if not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"attention: q has head_dim {q.shape[-1]}; it must be between 1 and 256")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"attention: q has {q.shape[-2]} heads, which the {k.shape[-2]} heads of k do not divide")
    if q.shape[0] != k.shape[0]:
        what = "batch" if cu_seqlens is None else "total_tokens"
        raise ValueError(f"attention: q has {what} {q.shape[0]} and k {k.shape[0]}; they must be the same")
    check_same("attention", "q", q, dtype=False, sinks=sinks, cu_seqlens=cu_seqlens)
    check_shape("attention", "sinks", sinks, (q.shape[-2],), "one score for each head of q")
    if cu_seqlens is not None:
        _check_documents(q, cu_seqlens, max_seqlen)
    elif max_seqlen is not None:
        raise ValueError("attention: max_seqlen is given without cu_seqlens; it is for packed inputs only")


def _check_documents(q: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; "
            "it must be int32 of shape (documents + 1,)"
        )
    if max_seqlen is not None and not (is_whole(max_seqlen) and max_seqlen >= 0):
        raise ValueError(f"attention: max_seqlen is {max_seqlen!r}; it must be a whole number, and not negative")
    # Reading values on a GPU would wait for it, and under torch.compile there are none to read.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_starts("attention", cu_seqlens, q.shape[0])
        longest = int(cu_seqlens.diff().max())
        if max_seqlen is not None and longest > max_seqlen:
            raise ValueError(f"attention: max_seqlen is {max_seqlen} but cu_seqlens holds a document of {longest}")


def _check_options(scale: float | None, window: int | None, softcap: float | None) -> None:
    if scale is not None and not is_number(scale):
        raise ValueError(f"attention: scale is {scale!r}; it must be finite, or None for 1 / sqrt(head_dim)")
    if window is not None and not (is_whole(window) and window >= 1):
        raise ValueError(f"attention: window is {window!r}; it must be a whole number of keys, at least 1, or None")
    if softcap is not None and not (is_number(softcap) and softcap > 0.0):
        raise ValueError(f"attention: softcap is {softcap!r}; it must be finite and above 0, or None")


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's own attention where that has the options, else from the whole matrix of scores."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    options: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    # What PyTorch's own attention computes, given the right mask.
    covered = softcap is None and sinks is None and not return_lse
    if cu_seqlens is not None:
        if covered and window is None and q.device.type == "cpu":
            packed: torch.Tensor = packed_cpu(q, k, v, cu_seqlens, causal, scale)[0]
            return packed
        return _by_document(q, k, v, cu_seqlens.tolist(), return_lse, options)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seq_q, seq_k = q.shape[2], k.shape[2]
    unmasked = window is None and (not causal or seq_q == seq_k)
    seen = None if unmasked and covered else _seen_by_place(seq_q, seq_k, causal, window, q.device)
    # Only where there are more queries than keys can one see nothing, for which PyTorch's attention has no rule.
    if covered and (unmasked or seq_q <= seq_k):
        out = F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=causal and unmasked, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)
    assert seen is not None
    out, lse = _from_scores(q, k, v, seen, scale, softcap, sinks)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


def _by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], return_lse: bool, options: dict[str, Any]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for start, end in itertools.pairwise(starts):
        result = reference(*(x[None, start:end] for x in (q, k, v)), **options, return_lse=return_lse)
        out, *lse = result if isinstance(result, tuple) else (result,)
        outs.append(out[0])
        lses.extend(part[0] for part in lse)
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)


def _seen_by_place(seq_q: int, seq_k: int, causal: bool, window: int | None, device: torch.device) -> torch.Tensor:
    """(seq_q, seq_k), bool: which keys each query sees."""
    place = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)
    key = torch.arange(seq_k, device=device)
    seen = key <= place if causal else torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    return seen if window is None else seen & ((place - key).abs() < window)


def _from_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse with heads before tokens, by way of the whole (seq_q, seq_k) matrix of scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).to(accumulation_dtype(q.dtype)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    # A row that sees nothing has lse −∞; 0 there keeps exp() at 0 instead of NaN.
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return p.to(v.dtype) @ v, lse


def _by_head_dim(*rows: tuple[int, int, int, int, int]) -> tuple[Configuration, ...]:
    """Configurations from (head_dim up to, BLOCK_Q, BLOCK_K, warps, stages)."""
    return tuple(
        Configuration(up_to, warps, {"BLOCK_Q": block_q, "BLOCK_K": block_k}, stages)
        for up_to, block_q, block_k, warps, stages in rows
    )


# Chosen for no register spills under any mask and option (at head_dim 256 a few, in the dkv pass on Hopper), read off
# the compiled code; not yet timed on a GPU. With 128 keys, each of Hopper's two warp groups has rows of dk and dv to
# itself, and the probabilities stay in registers from one product to the next. The candidates, for those who can time
# them, fit Hopper's shared memory in float32 too.
_FORWARD = LaunchTable(
    "attention forward",
    {
        80: _by_head_dim((64, 128, 64, 8, 3), (128, 128, 32, 8, 3), (256, 64, 32, 8, 2)),
        90: _by_head_dim((64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (256, 64, 64, 8, 2)),
    },
    _by_head_dim((64, 128, 128, 8, 2), (128, 128, 64, 8, 2), (128, 128, 64, 4, 3), (128, 64, 64, 4, 3)),
)
_BACKWARD_DKV = LaunchTable(
    "attention backward dkv",
    {
        80: _by_head_dim((64, 32, 128, 8, 2), (128, 32, 64, 8, 2), (256, 32, 32, 8, 1)),
        90: _by_head_dim((128, 32, 128, 8, 2), (256, 16, 64, 8, 2)),
    },
    _by_head_dim((128, 64, 64, 8, 2), (64, 64, 128, 8, 2), (128, 32, 128, 8, 3), (128, 32, 64, 4, 2)),
)
_BACKWARD_DQ = LaunchTable(
    "attention backward dq",
    {
        80: _by_head_dim((128, 64, 64, 8, 2), (256, 32, 32, 8, 1)),
        90: _by_head_dim((128, 64, 64, 8, 2), (256, 64, 32, 8, 2)),
    },
    _by_head_dim((64, 128, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 64, 4, 2), (128, 64, 32, 4, 2)),
)
_LOG2E = math.log2(math.e)


if HAS_TRITON:
    LOG2E = tl.constexpr(_LOG2E)

    @triton.jit
    def _span(cu_seqlens_ptr, sequence, seq_q, seq_k, PACKED: tl.constexpr):
        """A sequence's first token and its queries and keys: from `cu_seqlens` if packed, else 0 and what all have."""
        if PACKED:
            first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            length = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
            return first, length, length
        # The same types on both paths: int64 start, int32 lengths.
        return tl.zeros([], tl.int64), seq_q + tl.zeros([], tl.int32), seq_k + tl.zeros([], tl.int32)

    @triton.jit
    def _block(ptr, start, places, row_stride, dims):
        """Pointers to rows start + places of a (tokens, head_dim) slice."""
        # The start in int64, since tokens × stride may pass 2³¹; inside the block int32 will do (see `_addressable`),
        # and a block of 64-bit offsets would cost the registers that the accumulators need.
        return ptr + tl.cast(start, tl.int64) * row_stride + (places[:, None] * row_stride + dims[None, :])

    @triton.jit
    def _load_rows(ptr, start, places, row_stride, dims, rows, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
        """Rows start + places; zeros past the last row and past head_dim."""
        mask = (start + places < rows)[:, None]
        if HEAD_DIM != BLOCK_DIM:
            mask = mask & (dims < HEAD_DIM)[None, :]
        return tl.load(_block(ptr, start, places, row_stride, dims), mask=mask, other=0.0)

    @triton.jit
    def _store_rows(ptr, start, places, row_stride, dims, rows, value, HEAD_DIM: tl.constexpr):
        mask = (start + places < rows)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(_block(ptr, start, places, row_stride, dims), value.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _program(blocks, heads):
        """This program's block, head and sequence. The grid has one axis, as the others end at 65,535."""
        program = tl.program_id(0)
        head = program // blocks
        return program % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)

    @triton.jit
    def _down(x, block: tl.constexpr):
        """The last start of a block at or before x, and 0 for negative x."""
        return tl.maximum(x, 0) // block * block

    @triton.jit
    def _keys_of(
        start_q,
        seq_q,
        seq_k,
        window,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Where the keys of a block of queries start and end, and between which two all of its queries see all keys."""
        place = start_q + (seq_k - seq_q)  # of the block's first query
        first = tl.zeros([], tl.int32)
        whole_start = tl.zeros([], tl.int32)
        whole_end = seq_k // BLOCK_K * BLOCK_K
        end = seq_k
        if WINDOWED:
            first = _down(place - window + 1, BLOCK_K)
            whole_start = _down(place + BLOCK_Q - window + BLOCK_K - 1, BLOCK_K)
        if CAUSAL:
            whole_end = tl.minimum(whole_end, _down(place + 1, BLOCK_K))
            end = tl.minimum(end, place + BLOCK_Q)
        elif WINDOWED:
            whole_end = tl.minimum(whole_end, _down(place + window, BLOCK_K))
            end = tl.minimum(end, place + BLOCK_Q - 1 + window)
        end = tl.maximum(end, 0)
        whole_start = tl.minimum(whole_start, end)
        return first, whole_start, tl.maximum(whole_start, whole_end), end

    @triton.jit
    def _queries_of(
        start_k,
        seq_q,
        seq_k,
        window,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """Where the queries of a block of keys start and end, and between which two all queries see all of its keys."""
        query = start_k - (seq_k - seq_q)  # the one whose place is the block's first key
        first = tl.zeros([], tl.int32)
        whole_start = tl.zeros([], tl.int32)
        whole_end = seq_q
        end = seq_q
        if CAUSAL:
            first = _down(query, BLOCK_Q)
            whole_start = _down(query + BLOCK_K - 1 + BLOCK_Q - 1, BLOCK_Q)
        elif WINDOWED:
            first = _down(query - window + 1, BLOCK_Q)
            whole_start = _down(query + BLOCK_K - window + BLOCK_Q - 1, BLOCK_Q)
        if WINDOWED:
            whole_end = tl.minimum(whole_end, _down(query + window, BLOCK_Q))
            end = tl.maximum(tl.minimum(end, query + BLOCK_K - 1 + window), 0)
        # Keys past the last need no mask, as their rows of dk and dv are not stored. But with one, the compiler finds
        # registers for all else; without, it spills in several cases on Hopper.
        if start_k + BLOCK_K > seq_k:
            whole_start = end
        whole_start = tl.minimum(whole_start, end)
        return first, whole_start, tl.maximum(whole_start, whole_end), end

    @triton.jit
    def _seen(query, key, seq_q, seq_k, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
        """Which keys each query may see; the two come shaped to broadcast against each other."""
        place = query + (seq_k - seq_q)
        seen = key < seq_k
        if CAUSAL:
            seen = seen & (key <= place)
        elif WINDOWED:
            seen = seen & (key < place + window)
        if WINDOWED:
            seen = seen & (key > place - window)
        return seen

    @triton.jit
    def _tanh(x):
        """tanh from exp. Near 0, where 1 − 2 / (exp(2x) + 1) cancels, a polynomial fitted to |x| ≤ 0.6 (error 3e-9)."""
        square = x * x
        series = -5.895156e-3 * square + 2.0795970e-2
        series = series * square - 5.3783830e-2
        series = series * square + 1.33319241e-1
        series = series * square - 3.33332980e-1
        far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
        return tl.where(square < 0.36, x + x * square * series, far)

    @triton.jit
    def _scores(a, b, scale, softcap, SOFTCAPPED: tl.constexpr):
        """[rows of a, rows of b] twice: the scores in powers of 2, and tanh(score / softcap) where there is one."""
        if SOFTCAPPED:
            bend = _tanh(tl.dot(a, tl.trans(b), input_precision="ieee") * (scale / softcap))
            return bend * (softcap * LOG2E), bend
        scores = tl.dot(a, tl.trans(b), input_precision="ieee") * (scale * LOG2E)
        return scores, scores

    @triton.jit
    def _p_and_ds(
        a,
        b,
        da,
        db,
        lse,
        delta,
        query,
        key,
        seq_q,
        seq_k,
        scale,
        window,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        SOFTCAPPED: tl.constexpr,
        MASKED: tl.constexpr,
    ):
        """[rows of a, rows of b] twice: the probabilities, computed again, and the gradient of the scaled scores.

        With (q, k, dout, v) queries are rows, with (k, q, v, dout) keys are: then both results already lie as the
        products that they enter next want them, and need no transposition.
        """
        dp = tl.dot(da, tl.trans(db), input_precision="ieee")
        scores, bend = _scores(a, b, scale, softcap, SOFTCAPPED)
        p = tl.exp2(scores - lse)
        if MASKED:
            p = tl.where(_seen(query, key, seq_q, seq_k, window, CAUSAL, WINDOWED), p, 0.0)
        ds = p * (dp - delta)
        if SOFTCAPPED:
            ds = ds * (1.0 - bend * bend)
        return p, ds

    @triton.jit
    def _forward(
        q_ptr,
        k_ptr,
        v_ptr,
        sinks_ptr,
        out_ptr,
        lse_ptr,
        cu_seqlens_ptr,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        v_batch_stride,
        v_seq_stride,
        v_head_stride,
        out_batch_stride,
        out_seq_stride,
        out_head_stride,
        lse_batch_stride,
        lse_head_stride,
        blocks,
        heads,
        seq_q,
        seq_k,
        group,
        scale,
        window,
        softcap,
        HAS_SINKS: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        SOFTCAPPED: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        block, head, sequence = _program(blocks, heads)
        # The longest causal rows first, so that the last programs to run are the short ones.
        start_q = (blocks - 1 - block) * BLOCK_Q
        first, seq_q, seq_k = _span(cu_seqlens_ptr, sequence, seq_q, seq_k, PACKED)
        if start_q < seq_q:
            q_ptr += sequence * q_batch_stride + first * q_seq_stride + head * q_head_stride
            k_ptr += sequence * k_batch_stride + first * k_seq_stride + (head // group) * k_head_stride
            v_ptr += sequence * v_batch_stride + first * v_seq_stride + (head // group) * v_head_stride
            out_ptr += sequence * out_batch_stride + first * out_seq_stride + head * out_head_stride
            lse_ptr += sequence * lse_batch_stride + head * lse_head_stride + first

            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            query = start_q + queries
            q = _load_rows(q_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            out = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
            top = tl.full([BLOCK_Q], -float("inf"), tl.float32)  # running maximum of the scores, in powers of 2
            total = tl.zeros([BLOCK_Q], tl.float32)  # running Σ 2^(score − top)
            if HAS_SINKS:  # the score that each query has seen before any key
                top = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
                total = tl.full([BLOCK_Q], 1.0, tl.float32)

            edges = _keys_of(start_q, seq_q, seq_k, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
            # Three stretches of keys: cut by the window's far side, seen by all, cut by the near side or the end.
            for stretch in tl.static_range(0 if WINDOWED else 1, 3):
                for start_k in range(edges[stretch], edges[stretch + 1], BLOCK_K):
                    k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                    v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                    scores, _ = _scores(q, k, scale, softcap, SOFTCAPPED)  # [BLOCK_Q, BLOCK_K]
                    if stretch != 1:
                        key = start_k + keys
                        seen = _seen(query[:, None], key[None, :], seq_q, seq_k, window, CAUSAL, WINDOWED)
                        scores = tl.where(seen, scores, -float("inf"))
                    p, top, total, shrink = _online_softmax(scores, top, total)
                    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            out = out / tl.where(total == 0.0, 1.0, total)[:, None]
            _store_rows(out_ptr, start_q, queries, out_seq_stride, dims, seq_q, out, HEAD_DIM)
            lse = (top + tl.log2(total)) / LOG2E  # −∞ where nothing was seen
            tl.store(lse_ptr + query, lse, mask=query < seq_q)

    @triton.jit
    def _online_softmax(scores, top, total):
        """Probabilities relative to the new running maximum, that maximum and sum, and how much the old ones shrink."""
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A query that has seen nothing yet has top −∞; 0 in its place gives exp2(−∞) = 0 and not NaN.
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - finite_top[:, None])  # [BLOCK_Q, BLOCK_K]
        shrink = tl.exp2(top - finite_top)
        return p, new_top, total * shrink + tl.sum(p, axis=1), shrink

    @triton.jit
    def _backward_delta(
        out_ptr,
        dout_ptr,
        dlse_ptr,
        lse_ptr,
        sinks_ptr,
        delta_ptr,
        dsinks_ptr,
        out_token_stride,
        out_head_stride,
        dout_token_stride,
        dout_head_stride,
        tokens,
        seq,
        heads,
        HAS_DLSE: tl.constexpr,
        HAS_SINKS: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
    ):
        """D = rowsum(out · dout) − dlse, laid out as lse is: (batch, heads, seq), or (heads, tokens) if packed.

        And this block of tokens' part of each sink's gradient: (blocks of tokens, heads).
        """
        program = tl.program_id(0)
        head = (program % heads).to(tl.int64)
        start = (program // heads).to(tl.int64) * BLOCK_TOKENS
        places = tl.arange(0, BLOCK_TOKENS)
        token = start + places
        dims = tl.arange(0, BLOCK_DIM)
        out_ptr += head * out_head_stride
        dout_ptr += head * dout_head_stride
        out = _load_rows(out_ptr, start, places, out_token_stride, dims, tokens, HEAD_DIM, BLOCK_DIM)
        dout = _load_rows(dout_ptr, start, places, dout_token_stride, dims, tokens, HEAD_DIM, BLOCK_DIM)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        if PACKED:
            place = head * tokens + token
        else:
            place = (token // seq * heads + head) * seq + token % seq
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + place, mask=token < tokens, other=0.0)
        tl.store(delta_ptr + place, delta, mask=token < tokens)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32)
            lse = tl.load(lse_ptr + place, mask=token < tokens, other=float("inf"))
            # A sink of −∞ takes part in no row, not even in one whose lse is −∞ too.
            p = tl.where(sink > -float("inf"), tl.exp2((sink - lse) * LOG2E), 0.0)
            tl.store(dsinks_ptr + program, -tl.sum(p * delta, axis=0))

    @triton.jit
    def _backward_dkv(
        q_ptr,
        k_ptr,
        v_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dk_ptr,
        dv_ptr,
        cu_seqlens_ptr,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        v_batch_stride,
        v_seq_stride,
        v_head_stride,
        dout_batch_stride,
        dout_seq_stride,
        dout_head_stride,
        dk_batch_stride,
        dk_seq_stride,
        dk_head_stride,
        lse_batch_stride,
        lse_head_stride,
        blocks,
        kv_heads,
        seq_q,
        seq_k,
        group,
        scale,
        window,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        SOFTCAPPED: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # The program owns one block of dk and dv: it sums over the queries, and over the query heads of its key head.
        block, kv_head, sequence = _program(blocks, kv_heads)
        start_k = block * BLOCK_K
        first, seq_q, seq_k = _span(cu_seqlens_ptr, sequence, seq_q, seq_k, PACKED)
        if start_k < seq_k:
            k_ptr += sequence * k_batch_stride + first * k_seq_stride + kv_head * k_head_stride
            v_ptr += sequence * v_batch_stride + first * v_seq_stride + kv_head * v_head_stride
            place = sequence * dk_batch_stride + first * dk_seq_stride + kv_head * dk_head_stride
            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            key = start_k + keys
            k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
            v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
            dk = tl.zeros([BLOCK_K, BLOCK_DIM], tl.float32)
            dv = tl.zeros([BLOCK_K, BLOCK_DIM], tl.float32)

            edges = _queries_of(start_k, seq_q, seq_k, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
            for h in tl.range(group, disable_licm=True):
                head = kv_head * group + h
                q_head_ptr = q_ptr + sequence * q_batch_stride + first * q_seq_stride + head * q_head_stride
                dout_head_ptr = (
                    dout_ptr + sequence * dout_batch_stride + first * dout_seq_stride + head * dout_head_stride
                )
                row = sequence * lse_batch_stride + head * lse_head_stride + first
                # Three stretches of queries: cut by the diagonal, seeing all keys, cut by the window's far side.
                for stretch in tl.static_range(0, 3 if WINDOWED else 2):
                    for start_q in range(edges[stretch], edges[stretch + 1], BLOCK_Q):
                        query = start_q + queries
                        q = _load_rows(q_head_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
                        dout = _load_rows(
                            dout_head_ptr, start_q, queries, dout_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM
                        )
                        # lse +∞ past the last query makes its probabilities 0.
                        lse = tl.load(lse_ptr + row + query, mask=query < seq_q, other=float("inf")) * LOG2E
                        delta = tl.load(delta_ptr + row + query, mask=query < seq_q, other=0.0)
                        p, ds = _p_and_ds(  # [BLOCK_K, BLOCK_Q]
                            k,
                            q,
                            v,
                            dout,
                            lse[None, :],
                            delta[None, :],
                            query[None, :],
                            key[:, None],
                            seq_q,
                            seq_k,
                            scale,
                            window,
                            softcap,
                            CAUSAL,
                            WINDOWED,
                            SOFTCAPPED,
                            stretch != 1,
                        )
                        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            _store_rows(dk_ptr + place, start_k, keys, dk_seq_stride, dims, seq_k, dk * scale, HEAD_DIM)
            _store_rows(dv_ptr + place, start_k, keys, dk_seq_stride, dims, seq_k, dv, HEAD_DIM)

    @triton.jit
    def _backward_dq(
        q_ptr,
        k_ptr,
        v_ptr,
        dout_ptr,
        lse_ptr,
        delta_ptr,
        dq_ptr,
        cu_seqlens_ptr,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        v_batch_stride,
        v_seq_stride,
        v_head_stride,
        dout_batch_stride,
        dout_seq_stride,
        dout_head_stride,
        dq_batch_stride,
        dq_seq_stride,
        dq_head_stride,
        lse_batch_stride,
        lse_head_stride,
        blocks,
        heads,
        seq_q,
        seq_k,
        group,
        scale,
        window,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        SOFTCAPPED: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        block, head, sequence = _program(blocks, heads)
        start_q = (blocks - 1 - block) * BLOCK_Q
        first, seq_q, seq_k = _span(cu_seqlens_ptr, sequence, seq_q, seq_k, PACKED)
        if start_q < seq_q:
            q_ptr += sequence * q_batch_stride + first * q_seq_stride + head * q_head_stride
            k_ptr += sequence * k_batch_stride + first * k_seq_stride + (head // group) * k_head_stride
            v_ptr += sequence * v_batch_stride + first * v_seq_stride + (head // group) * v_head_stride
            dout_ptr += sequence * dout_batch_stride + first * dout_seq_stride + head * dout_head_stride
            dq_ptr += sequence * dq_batch_stride + first * dq_seq_stride + head * dq_head_stride
            lse_ptr += sequence * lse_batch_stride + head * lse_head_stride + first
            delta_ptr += sequence * lse_batch_stride + head * lse_head_stride + first

            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            query = start_q + queries
            q = _load_rows(q_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            dout = _load_rows(dout_ptr, start_q, queries, dout_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            lse = tl.load(lse_ptr + query, mask=query < seq_q, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + query, mask=query < seq_q, other=0.0)
            dq = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)

            edges = _keys_of(start_q, seq_q, seq_k, window, CAUSAL, WINDOWED, BLOCK_Q, BLOCK_K)
            for stretch in tl.static_range(0 if WINDOWED else 1, 3):
                for start_k in range(edges[stretch], edges[stretch + 1], BLOCK_K):
                    key = start_k + keys
                    k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                    v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                    _, ds = _p_and_ds(  # [BLOCK_Q, BLOCK_K]
                        q,
                        k,
                        dout,
                        v,
                        lse[:, None],
                        delta[:, None],
                        query[:, None],
                        key[None, :],
                        seq_q,
                        seq_k,
                        scale,
                        window,
                        softcap,
                        CAUSAL,
                        WINDOWED,
                        SOFTCAPPED,
                        stretch != 1,
                    )
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            _store_rows(dq_ptr, start_q, queries, dq_seq_stride, dims, seq_q, dq * scale, HEAD_DIM)


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy where its layout is one that the kernels do not read: no unit stride along head_dim, or
    tokens so far apart that the offsets inside a block of up to 128 of them pass 2³¹."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**23 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides over (sequence, token, head); packed tokens all lie in one, so the first is 0."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.ndim == 4 else (0, x.stride(0), x.stride(1))


def _lengths(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int
) -> tuple[int, int, int]:
    """Sequences, and the longest one of queries and of keys."""
    if cu_seqlens is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return cu_seqlens.numel() - 1, max_seqlen, max_seqlen


def _binding(window: int | None, seq_q: int, seq_k: int) -> int | None:
    """`window`, or None where no query and key of these lengths are that far apart."""
    return window if window is not None and window < max(seq_q, seq_k) else None


def _lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def _constants(
    table: LaunchTable, q: torch.Tensor, causal: bool, packed: bool, window: int | None, softcap: float | None
) -> dict[str, Any]:
    head_dim = q.shape[-1]
    configuration = table.pick(head_dim, q.device)
    return {
        "CAUSAL": causal,
        "WINDOWED": window is not None,
        "SOFTCAPPED": softcap is not None,
        "PACKED": packed,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),  # the matrix units take no less than 16
        **configuration.blocks,
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
    }


def _programs(blocks: int, heads: int, sequences: int) -> tuple[int]:
    """The grid; it has one axis, which takes 2³¹ − 1 programs where the second and third take 65,535."""
    programs = blocks * heads * sequences
    if programs >= 2**31:
        raise ValueError(
            f"attention: {sequences} sequences of {heads} heads make {programs} programs of one launch, which takes "
            f"fewer than {2**31}: split the batch, or give a smaller max_seqlen"
        )
    return (programs,)


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (_addressable(x) for x in (q, k, v))
    sequences, seq_q, seq_k = _lengths(q, k, cu_seqlens, max_seqlen)
    window = _binding(window, seq_q, seq_k)
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    constants = _constants(_FORWARD, q, causal, cu_seqlens is not None, window, softcap)
    blocks = triton.cdiv(seq_q, constants["BLOCK_Q"])
    _forward[_programs(blocks, heads, sequences)](
        q,
        k,
        v,
        sinks.contiguous() if sinks is not None else lse,
        out,
        lse,
        cu_seqlens if cu_seqlens is not None else lse,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        *_lse_strides(lse),
        blocks,
        heads,
        seq_q,
        seq_k,
        group,
        scale,
        window or 0,
        softcap or 0.0,
        HAS_SINKS=sinks is not None,
        **constants,
    )
    return out, lse


def _launch_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta, dsinks = _launch_delta(out, dout, dlse, lse, sinks)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    q, k, v, dout = (_addressable(x) for x in (q, k, v, dout))
    packed = cu_seqlens is not None
    sequences, seq_q, seq_k = _lengths(q, k, cu_seqlens, max_seqlen)
    window = _binding(window, seq_q, seq_k)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    documents = cu_seqlens if packed else lse
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    sizes = (seq_q, seq_k, heads // kv_heads, scale, window or 0, softcap or 0.0)

    constants = _constants(_BACKWARD_DKV, q, causal, packed, window, softcap)
    blocks = triton.cdiv(seq_k, constants["BLOCK_K"])
    arguments = (*strides, *_strides(dk), *_lse_strides(lse), blocks, kv_heads, *sizes)
    grid = _programs(blocks, kv_heads, sequences)
    _backward_dkv[grid](q, k, v, dout, lse, delta, dk, dv, documents, *arguments, **constants)

    constants = _constants(_BACKWARD_DQ, q, causal, packed, window, softcap)
    blocks = triton.cdiv(seq_q, constants["BLOCK_Q"])
    arguments = (*strides, *_strides(dq), *_lse_strides(lse), blocks, heads, *sizes)
    grid = _programs(blocks, heads, sequences)
    _backward_dq[grid](q, k, v, dout, lse, delta, dq, documents, *arguments, **constants)
    return dq, dk, dv, dsinks


def _launch_delta(
    out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None, lse: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """D as lse is laid out, and the gradient of the sinks, which is empty where there are none."""
    delta = torch.empty_like(lse)
    tokens, heads, head_dim = lse.numel() // max(1, out.shape[-2]), out.shape[-2], out.shape[-1]
    block_tokens = 64
    blocks = triton.cdiv(tokens, block_tokens)
    partial = torch.empty(blocks, heads if sinks is not None else 0, dtype=torch.float32, device=out.device)
    if lse.numel():
        flat = _addressable(dout.reshape(tokens, heads, head_dim))  # a copy only where the upstream does not flatten
        _backward_delta[_programs(blocks, heads, 1)](
            out,
            flat,
            dlse.contiguous() if dlse is not None else delta,
            lse,
            sinks.contiguous() if sinks is not None else lse,
            delta,
            partial,
            heads * head_dim,
            head_dim,
            flat.stride(0),
            flat.stride(1),
            tokens,
            out.shape[1] if out.ndim == 4 else tokens,
            heads,
            HAS_DLSE=dlse is not None,
            HAS_SINKS=sinks is not None,
            PACKED=out.ndim == 3,
            HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            BLOCK_TOKENS=block_tokens,
            num_warps=4,
        )
    return delta, partial.sum(0).to(sinks.dtype if sinks is not None else torch.float32)


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=torch.float32)


def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_forward_op = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, "
    "float scale, SymInt? window, float? softcap) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, "
    "Tensor lse, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale, SymInt? window, float? softcap)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, cu_seqlens, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(q, k, v, sinks, *output, cu_seqlens)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 10
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = _backward_op(dout, dlse, q, k, v, sinks, out, lse, cu_seqlens, *ctx.options)
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 6


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def qkv(batch: int, seq_q: int, seq_k: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        kv = (batch, seq_k, kv_heads, head_dim)
        return {"q": normal(batch, seq_q, heads, head_dim), "k": normal(*kv), "v": normal(*kv)}

    def packed(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        tokens = sum(lengths)
        return {**{name: x[0] for name, x in qkv(1, tokens, tokens, 2, 1, 16).items()}, "cu_seqlens": starts}

    yield Sample("causal", qkv(1, 9, 9, 1, 1, 16))
    yield Sample("one token", qkv(1, 1, 1, 1, 1, 8))
    yield Sample("three rows", qkv(3, 6, 6, 2, 1, 8))
    yield Sample("grouped query", qkv(1, 5, 5, 4, 2, 8), {"return_lse": True})
    yield Sample("fewer queries", qkv(1, 3, 8, 2, 1, 16), {"scale": 0.3})
    yield Sample("more queries", qkv(1, 8, 3, 2, 1, 16), {"return_lse": True})
    yield Sample("packed (5, 0, 1, 7)", packed((5, 0, 1, 7)), {"max_seqlen": 9})
    fused = normal(2, 10, 4 * 16).view(2, 10, 4, 16)
    views = dict(zip(("q", "k", "v"), fused.split((2, 1, 1), dim=2), strict=True))
    yield Sample("views of a fused projection, window of one", views, {"window": 1})
    yield Sample("wide softcap", qkv(1, 7, 7, 1, 1, 16), {"softcap": 50.0})
    sinks = {"sinks": normal(2)}
    everything: dict[str, Any] = {"window": 40, "softcap": 8.0, "return_lse": True}
    yield Sample("everything, packed", {**packed((70, 0, 3)), **sinks}, {**everything, "max_seqlen": 70})
    yield Sample("no rows", {**qkv(0, 5, 5, 2, 1, 16), **sinks}, {"return_lse": True})
    yield Sample("no keys", {**qkv(2, 5, 0, 2, 1, 16), **sinks}, {"return_lse": True})
    yield Sample("no tokens", packed((0,)))

    # Past one block each way, so past what `small_samples` of the contract takes.
    yield Sample("127 tokens", qkv(1, 127, 127, 1, 1, 32))
    yield Sample("130 tokens, head_dim 80", qkv(1, 130, 130, 1, 1, 80))
    yield Sample("140 tokens, head_dim 256", qkv(1, 140, 140, 1, 1, 256), {"scale": 0.02})
    yield Sample("130 by 200, full", qkv(1, 130, 200, 1, 1, 64), {"causal": False})
    yield Sample("1000 keys", qkv(1, 7, 1000, 1, 1, 16))
    yield Sample("packed (60, 130, 1)", packed((60, 130, 1)))
    yield Sample("window", qkv(1, 160, 160, 1, 1, 16), {"window": 37})
    yield Sample("window, full", qkv(1, 90, 160, 1, 1, 16), {"window": 20, "causal": False})
    yield Sample("window, more queries", qkv(1, 160, 60, 1, 1, 16), {"window": 30, "return_lse": True})
    yield Sample("window, 4097 keys", qkv(1, 7, 4097, 1, 1, 16), {"window": 300})
    yield Sample("softcap", qkv(1, 80, 80, 2, 1, 16), {"softcap": 5.0, "return_lse": True})
    # Many heads: of only two sinks, PyTorch may get both gradients right by luck.
    many = {**qkv(1, 10, 10, 32, 4, 16), "sinks": normal(32)}
    yield Sample("sinks", many, {"return_lse": True})
    yield Sample("float32 sinks", many, float32=frozenset({"sinks"}))
    yield Sample("everything", {**qkv(1, 80, 100, 2, 1, 16), **sinks}, everything)
    yield Sample("everything, packed, full", {**packed((80, 0, 1)), **sinks}, {**everything, "causal": False})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    heads_of = {model.name: (model.heads, model.kv_heads, model.head_dim) for model in MODELS}
    heads_of |= {"head_dim 256": (16, 4, 256)}
    for name, (heads, kv_heads, head_dim) in heads_of.items():
        for length_name, sequences, length in batches(small=False):
            # What is computed for one head shows it for all, but not what is computed of one sequence for another.
            if small:
                heads, kv_heads, sequences = 1, 1, 1
            q = torch.empty(sequences, length, heads, head_dim, dtype=dtype)
            kv = q.new_empty(sequences, length, kv_heads, head_dim)
            dense = {"q": q, "k": kv, "v": torch.empty_like(kv)}
            # 32k takes the interpreter minutes, and has the least to show: fewer pairs are masked, the longer it is.
            if not (small and length_name == "32k"):
                yield Sample(f"{name} {length_name}", dense)
            if small or length_name != "8k" or name not in ("1B", "8B", "head_dim 256"):
                continue
            yield Sample(f"{name} {length_name}, full", dense, {"causal": False})
            starts = torch.tensor([0, length // 2, length], dtype=torch.int32)
            packed = {"q": q[0], "k": kv[0], "v": torch.empty_like(kv[0]), "cu_seqlens": starts}
            yield Sample(f"{name} {length_name}, packed", packed, {"max_seqlen": length // 2})
            if head_dim == 256:
                continue
            sinks = {"sinks": q.new_empty(heads)}
            yield Sample(f"{name} {length_name}, window", dense, {"window": 1024})
            yield Sample(f"{name} {length_name}, softcap", dense, {"softcap": 50.0})
            yield Sample(f"{name} {length_name}, sinks", {**dense, **sinks})
            everything = {"window": 1024, "softcap": 50.0, "max_seqlen": length // 2}
            yield Sample(
                f"{name} {length_name}, packed with window, softcap and sinks", {**packed, **sinks}, everything
            )


def _work(sample: Sample) -> Passes:
    """Forward: q, k, v and sinks in, the output out. Backward: these, the output and its gradient in; gradients out.

    Backward needs five matrix products to forward's two: one of each is the same.
    """
    inputs = sample.nbytes("q", "k", "v", "sinks")
    flops = _flops(sample)
    return Passes(Work(flops, inputs + sample.nbytes("q")), Work(5 * flops // 2, 2 * inputs + 2 * sample.nbytes("q")))


def _flops(sample: Sample) -> int:
    """Two matrix products over the pairs of query and key that see each other, at 2 operations a multiply-add."""
    q, k = sample.tensors["q"], sample.tensors["k"]
    spans = [(q.shape[1], k.shape[1])] * q.shape[0]
    if "cu_seqlens" in sample.tensors:
        spans = [(length, length) for length in sample.tensors["cu_seqlens"].diff().tolist()]
    window = sample.options.get("window") or max((max(span) for span in spans), default=0) + 1
    pairs = 0
    for seq_q, seq_k in spans:
        place = torch.arange(seq_q) + (seq_k - seq_q)
        last = place if sample.options.get("causal", True) else place + window - 1
        seen = last.clamp(max=seq_k - 1) - (place - window + 1).clamp(min=0) + 1
        pairs += int(seen.clamp(min=0).sum())
    return 4 * pairs * q.shape[-2] * q.shape[-1]


SPEC = OpSpec(
    name="attention",
    function=attention,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    matmuls={"_forward": 2, "_backward_dkv": 4, "_backward_dq": 3},
    strided=("q", "k", "v"),
    tables={"forward": _FORWARD, "backward dkv": _BACKWARD_DKV, "backward dq": _BACKWARD_DQ},
)
