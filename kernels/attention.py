"""Scaled dot-product attention, never holding the score matrix (Dao 2023, FlashAttention-2, arXiv:2307.08691).

For each query i over the keys j that it may see, with s_ij = scale · q_i · k_j:

    lse_i = log Σ_j exp(s_ij)        p_ij = exp(s_ij − lse_i)        out_i = Σ_j p_ij v_j

Backward, for an upstream gradient g of out and h of lse, with D_i = g_i · out_i − h_i:

    dv_j = Σ_i p_ij g_i                 ds_ij = p_ij (g_i · v_j − D_i)
    dq_i = scale Σ_j ds_ij k_j          dk_j = scale Σ_i ds_ij q_i

Shapes: q (batch, seq_q, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim), where kv_heads divides heads
and query head h reads key head h // (heads / kv_heads). Packed: (total_tokens, heads, head_dim) with the start of each
document in `cu_seqlens`; no query sees another document. Causal attention is aligned at the bottom right: the last
query sees every key. A query that sees no key gives zeros and lse −∞.

Numerics: scores, softmax and all sums are float32; the probabilities are rounded to the inputs' dtype before they meet
v, as the tensor cores want. The backward pass is two kernels, one that owns each dk and dv block and one that owns each
dq block: no atomics, so two runs agree to the bit. Blocks that the mask empties are skipped, and only the blocks on the
diagonal or at the end of a sequence are masked at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Sample
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
        window, softcap, sinks: not supported yet; must be None.
        cu_seqlens: (documents + 1,) int32, where each document starts, then total_tokens; for packed inputs.
        max_seqlen: the longest document, or an upper bound; read from `cu_seqlens` if None, which waits for the device.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        out like q; with `return_lse` (out, lse), lse float32 of shape (batch, heads, seq_q), or (heads, total_tokens).

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, {"window": window, "softcap": softcap, "sinks": sinks})
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not runs_triton(q):
        return reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, return_lse=return_lse)
    if cu_seqlens is None:
        max_seqlen = q.shape[1]
    elif max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    out, lse = _forward_op(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    return (out, lse) if return_lse else out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    unsupported: dict[str, Any],
) -> None:
    for name, value in unsupported.items():
        if value is not None:
            raise ValueError(f"attention: {name} is not supported yet; it must be None")
    check_float("attention", q=q, k=k, v=v)
    check_same("attention", "q", q, k=k, v=v)
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
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("attention: max_seqlen is given without cu_seqlens; it is for packed inputs only")
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"attention: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; "
            "it must be int32 of shape (documents + 1,)"
        )
    check_same("attention", "q", q, dtype=False, cu_seqlens=cu_seqlens)
    # Reading values on a GPU would wait for it, and under torch.compile there are none to read.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != q.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"attention: cu_seqlens goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; it must rise from 0 "
                f"to the {q.shape[0]} tokens of q and never fall"
            )
        longest = int(cu_seqlens.diff().max())
        if max_seqlen is not None and longest > max_seqlen:
            raise ValueError(f"attention: max_seqlen is {max_seqlen} but cu_seqlens holds a document of {longest}")


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's own attention; with `return_lse`, from the whole matrix of scores."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cu_seqlens is not None:
        if q.device.type == "cpu" and not return_lse:
            packed: torch.Tensor = _packed_cpu_op(q, k, v, cu_seqlens, causal, scale)[0]
            return packed
        return _reference_by_document(q, k, v, cu_seqlens.tolist(), causal, scale, return_lse)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not return_lse and (not causal or q.shape[2] == k.shape[2]):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).to(accumulation_dtype(q.dtype)) * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    # A row that sees nothing has lse −∞; 0 there keeps exp() at 0 instead of NaN.
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = (p.to(v.dtype) @ v).transpose(1, 2)
    return (out, lse) if return_lse else out


def _reference_by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], causal: bool, scale: float, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    for start, end in itertools.pairwise(starts):
        document = (x[None, start:end] for x in (q, k, v))
        result = reference(*document, causal=causal, scale=scale, return_lse=return_lse)
        out, *lse = result if isinstance(result, tuple) else (result,)
        outs.append(out[0])
        lses.extend(part[0] for part in lse)
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)


def _by_head_dim(*rows: tuple[int, int, int, int, int]) -> tuple[Configuration, ...]:
    """Configurations from (head_dim up to, BLOCK_Q, BLOCK_K, warps, stages)."""
    return tuple(
        Configuration(up_to, warps, {"BLOCK_Q": block_q, "BLOCK_K": block_k}, stages)
        for up_to, block_q, block_k, warps, stages in rows
    )


# Chosen for the fewest register spills, read off the compiled code; not yet timed on a GPU.
_FORWARD = LaunchTable(
    {
        80: _by_head_dim((64, 128, 64, 8, 3), (128, 128, 64, 8, 2), (256, 64, 32, 8, 2)),
        90: _by_head_dim((64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (256, 64, 64, 8, 2)),
    }
)
_BACKWARD_DKV = LaunchTable(
    {
        80: _by_head_dim((64, 64, 64, 8, 1), (128, 64, 64, 8, 3), (256, 32, 32, 8, 1)),
        90: _by_head_dim((64, 64, 64, 8, 2), (128, 64, 64, 8, 1), (256, 32, 64, 8, 1)),
    }
)
_BACKWARD_DQ = LaunchTable(
    {
        80: _by_head_dim((64, 64, 64, 8, 2), (128, 64, 64, 8, 2), (256, 32, 32, 8, 1)),
        90: _by_head_dim((64, 64, 64, 8, 2), (128, 64, 64, 8, 2), (256, 32, 64, 8, 1)),
    }
)
_LOG2E = math.log2(math.e)


if HAS_TRITON:
    LOG2E = tl.constexpr(_LOG2E)

    @triton.jit
    def _span(cu_seqlens_ptr, sequence, seq_len, PACKED: tl.constexpr):
        """First token and length of a sequence: from `cu_seqlens` if packed, else 0 and the common length."""
        if PACKED:
            start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            return start, (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
        # The same types on both paths: int64 start, int32 length.
        return tl.zeros([], tl.int64), seq_len + tl.zeros([], tl.int32)

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
    def _seen(query, key, seq_q, seq_k, CAUSAL: tl.constexpr):
        """[BLOCK_Q, BLOCK_K]: which keys each query may see."""
        seen = (key < seq_k)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None] + (seq_k - seq_q))
        return seen

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
    def _p_and_ds(
        q, k, v, dout, lse, delta, query, key, seq_q, seq_k, scale_log2, CAUSAL: tl.constexpr, MASKED: tl.constexpr
    ):
        """[BLOCK_Q, BLOCK_K] twice: the probabilities, computed again, and the gradient of the scaled scores."""
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            p = tl.where(_seen(query, key, seq_q, seq_k, CAUSAL), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        return p, p * (dp - delta[:, None])

    @triton.jit
    def _forward(
        q_ptr,
        k_ptr,
        v_ptr,
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
        seq_q,
        seq_k,
        group,
        scale,
        CAUSAL: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # The longest causal rows first, so that the last programs to run are the short ones.
        start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        head = tl.program_id(1).to(tl.int64)
        sequence = tl.program_id(2).to(tl.int64)
        first_q, seq_q = _span(cu_seqlens_ptr, sequence, seq_q, PACKED)
        first_k, seq_k = _span(cu_seqlens_ptr, sequence, seq_k, PACKED)
        if start_q < seq_q:
            q_ptr += sequence * q_batch_stride + first_q * q_seq_stride + head * q_head_stride
            k_ptr += sequence * k_batch_stride + first_k * k_seq_stride + (head // group) * k_head_stride
            v_ptr += sequence * v_batch_stride + first_k * v_seq_stride + (head // group) * v_head_stride
            out_ptr += sequence * out_batch_stride + first_q * out_seq_stride + head * out_head_stride
            lse_ptr += sequence * lse_batch_stride + head * lse_head_stride + first_q

            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            query = start_q + queries
            q = _load_rows(q_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            out = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
            top = tl.full([BLOCK_Q], -float("inf"), tl.float32)  # running maximum of the scores, in powers of 2
            total = tl.zeros([BLOCK_Q], tl.float32)  # running Σ 2^(score − top)
            scale_log2 = scale * LOG2E

            whole_end = seq_k // BLOCK_K * BLOCK_K  # keys up to here need no mask
            end = seq_k
            if CAUSAL:
                whole_end = tl.minimum(whole_end, tl.maximum(start_q + 1 + seq_k - seq_q, 0) // BLOCK_K * BLOCK_K)
                end = tl.minimum(end, start_q + BLOCK_Q + seq_k - seq_q)
            for start_k in range(0, whole_end, BLOCK_K):
                key = start_k + keys
                k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
                p, top, total, shrink = _online_softmax(scores, top, total)
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            for start_k in range(whole_end, end, BLOCK_K):
                key = start_k + keys
                k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
                scores = tl.where(_seen(query, key, seq_q, seq_k, CAUSAL), scores, -float("inf"))
                p, top, total, shrink = _online_softmax(scores, top, total)
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            out = out / tl.where(total == 0.0, 1.0, total)[:, None]
            _store_rows(out_ptr, start_q, queries, out_seq_stride, dims, seq_q, out, HEAD_DIM)
            lse = (top + tl.log2(total)) / LOG2E  # −∞ where nothing was seen
            tl.store(lse_ptr + query, lse, mask=query < seq_q)

    @triton.jit
    def _backward_delta(
        out_ptr,
        dout_ptr,
        dlse_ptr,
        delta_ptr,
        out_token_stride,
        out_head_stride,
        dout_token_stride,
        dout_head_stride,
        tokens,
        seq,
        heads,
        HAS_DLSE: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
    ):
        """D = rowsum(out · dout) − dlse, laid out as lse is: (batch, heads, seq), or (heads, tokens) if packed."""
        start = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS
        places = tl.arange(0, BLOCK_TOKENS)
        token = start + places
        head = tl.program_id(1).to(tl.int64)
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
        seq_q,
        seq_k,
        group,
        scale,
        CAUSAL: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # The program owns one block of dk and dv: it sums over the queries, and over the query heads of its key head.
        start_k = tl.program_id(0) * BLOCK_K
        kv_head = tl.program_id(1).to(tl.int64)
        sequence = tl.program_id(2).to(tl.int64)
        first_q, seq_q = _span(cu_seqlens_ptr, sequence, seq_q, PACKED)
        first_k, seq_k = _span(cu_seqlens_ptr, sequence, seq_k, PACKED)
        if start_k < seq_k:
            k_ptr += sequence * k_batch_stride + first_k * k_seq_stride + kv_head * k_head_stride
            v_ptr += sequence * v_batch_stride + first_k * v_seq_stride + kv_head * v_head_stride
            dk_ptr += sequence * dk_batch_stride + first_k * dk_seq_stride + kv_head * dk_head_stride
            dv_ptr += sequence * dk_batch_stride + first_k * dk_seq_stride + kv_head * dk_head_stride
            q_ptr += sequence * q_batch_stride + first_q * q_seq_stride
            dout_ptr += sequence * dout_batch_stride + first_q * dout_seq_stride
            lse_ptr += sequence * lse_batch_stride + first_q
            delta_ptr += sequence * lse_batch_stride + first_q

            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            key = start_k + keys
            k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
            v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
            dk = tl.zeros([BLOCK_K, BLOCK_DIM], tl.float32)
            dv = tl.zeros([BLOCK_K, BLOCK_DIM], tl.float32)
            scale_log2 = scale * LOG2E

            # Queries before `first_seen` see none of these keys; from `whole_start` on they see them all.
            first_seen = tl.zeros([], tl.int32)
            whole_start = tl.zeros([], tl.int32)
            if CAUSAL:
                first_seen = tl.maximum(start_k - (seq_k - seq_q), 0) // BLOCK_Q * BLOCK_Q
                whole_start = tl.maximum(start_k + BLOCK_K - 1 - (seq_k - seq_q), 0)
                whole_start = (whole_start + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
            if start_k + BLOCK_K > seq_k:  # the last block of keys is masked throughout
                whole_start = seq_q
            whole_start = tl.minimum(whole_start, seq_q)
            for h in range(group):
                head = kv_head * group + h
                q_head_ptr = q_ptr + head * q_head_stride
                dout_head_ptr = dout_ptr + head * dout_head_stride
                lse_head_ptr = lse_ptr + head * lse_head_stride
                delta_head_ptr = delta_ptr + head * lse_head_stride
                for start_q in range(first_seen, whole_start, BLOCK_Q):
                    query = start_q + queries
                    q = _load_rows(q_head_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
                    dout = _load_rows(
                        dout_head_ptr, start_q, queries, dout_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM
                    )
                    # lse +∞ past the last query makes its probabilities 0.
                    lse = tl.load(lse_head_ptr + query, mask=query < seq_q, other=float("inf")) * LOG2E
                    delta = tl.load(delta_head_ptr + query, mask=query < seq_q, other=0.0)
                    p, ds = _p_and_ds(q, k, v, dout, lse, delta, query, key, seq_q, seq_k, scale_log2, CAUSAL, True)
                    dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
                    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
                for start_q in range(whole_start, seq_q, BLOCK_Q):
                    query = start_q + queries
                    q = _load_rows(q_head_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
                    dout = _load_rows(
                        dout_head_ptr, start_q, queries, dout_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM
                    )
                    lse = tl.load(lse_head_ptr + query, mask=query < seq_q, other=float("inf")) * LOG2E
                    delta = tl.load(delta_head_ptr + query, mask=query < seq_q, other=0.0)
                    p, ds = _p_and_ds(q, k, v, dout, lse, delta, query, key, seq_q, seq_k, scale_log2, CAUSAL, False)
                    dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
                    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
            _store_rows(dk_ptr, start_k, keys, dk_seq_stride, dims, seq_k, dk * scale, HEAD_DIM)
            _store_rows(dv_ptr, start_k, keys, dk_seq_stride, dims, seq_k, dv, HEAD_DIM)

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
        seq_q,
        seq_k,
        group,
        scale,
        CAUSAL: tl.constexpr,
        PACKED: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        head = tl.program_id(1).to(tl.int64)
        sequence = tl.program_id(2).to(tl.int64)
        first_q, seq_q = _span(cu_seqlens_ptr, sequence, seq_q, PACKED)
        first_k, seq_k = _span(cu_seqlens_ptr, sequence, seq_k, PACKED)
        if start_q < seq_q:
            q_ptr += sequence * q_batch_stride + first_q * q_seq_stride + head * q_head_stride
            k_ptr += sequence * k_batch_stride + first_k * k_seq_stride + (head // group) * k_head_stride
            v_ptr += sequence * v_batch_stride + first_k * v_seq_stride + (head // group) * v_head_stride
            dout_ptr += sequence * dout_batch_stride + first_q * dout_seq_stride + head * dout_head_stride
            dq_ptr += sequence * dq_batch_stride + first_q * dq_seq_stride + head * dq_head_stride
            lse_ptr += sequence * lse_batch_stride + head * lse_head_stride + first_q
            delta_ptr += sequence * lse_batch_stride + head * lse_head_stride + first_q

            queries, keys, dims = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
            query = start_q + queries
            q = _load_rows(q_ptr, start_q, queries, q_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            dout = _load_rows(dout_ptr, start_q, queries, dout_seq_stride, dims, seq_q, HEAD_DIM, BLOCK_DIM)
            lse = tl.load(lse_ptr + query, mask=query < seq_q, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + query, mask=query < seq_q, other=0.0)
            dq = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
            scale_log2 = scale * LOG2E

            whole_end = seq_k // BLOCK_K * BLOCK_K
            end = seq_k
            if CAUSAL:
                whole_end = tl.minimum(whole_end, tl.maximum(start_q + 1 + seq_k - seq_q, 0) // BLOCK_K * BLOCK_K)
                end = tl.minimum(end, start_q + BLOCK_Q + seq_k - seq_q)
            for start_k in range(0, whole_end, BLOCK_K):
                key = start_k + keys
                k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                _, ds = _p_and_ds(q, k, v, dout, lse, delta, query, key, seq_q, seq_k, scale_log2, CAUSAL, False)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
            for start_k in range(whole_end, end, BLOCK_K):
                key = start_k + keys
                k = _load_rows(k_ptr, start_k, keys, k_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                v = _load_rows(v_ptr, start_k, keys, v_seq_stride, dims, seq_k, HEAD_DIM, BLOCK_DIM)
                _, ds = _p_and_ds(q, k, v, dout, lse, delta, query, key, seq_q, seq_k, scale_log2, CAUSAL, True)
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


def _lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def _constants(table: LaunchTable, q: torch.Tensor, causal: bool, packed: bool) -> dict[str, Any]:
    head_dim = q.shape[-1]
    configuration = table.pick(head_dim, q.device)
    return {
        "CAUSAL": causal,
        "PACKED": packed,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),  # the matrix units take no less than 16
        **configuration.blocks,
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
    }


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = (_addressable(x) for x in (q, k, v))
    sequences, seq_q, seq_k = _lengths(q, k, cu_seqlens, max_seqlen)
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    constants = _constants(_FORWARD, q, causal, cu_seqlens is not None)
    _forward[(triton.cdiv(seq_q, constants["BLOCK_Q"]), heads, sequences)](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens if cu_seqlens is not None else lse,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        *_lse_strides(lse),
        seq_q,
        seq_k,
        group,
        scale,
        **constants,
    )
    return out, lse


def _launch_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout = (_addressable(x) for x in (q, k, v, dout))
    packed = cu_seqlens is not None
    sequences, seq_q, seq_k = _lengths(q, k, cu_seqlens, max_seqlen)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    delta = torch.empty_like(lse)
    _launch_delta(out, dout, dlse, delta)
    shared = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    sizes = (*_lse_strides(lse), seq_q, seq_k, heads // kv_heads, scale)
    documents = cu_seqlens if packed else lse
    constants = _constants(_BACKWARD_DKV, q, causal, packed)
    _backward_dkv[(triton.cdiv(seq_k, constants["BLOCK_K"]), kv_heads, sequences)](
        q, k, v, dout, lse, delta, dk, dv, documents, *shared, *_strides(dk), *sizes, **constants
    )
    constants = _constants(_BACKWARD_DQ, q, causal, packed)
    _backward_dq[(triton.cdiv(seq_q, constants["BLOCK_Q"]), heads, sequences)](
        q, k, v, dout, lse, delta, dq, documents, *shared, *_strides(dq), *sizes, **constants
    )
    return dq, dk, dv


def _launch_delta(out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None, delta: torch.Tensor) -> None:
    tokens, heads, head_dim = out.numel() // (out.shape[-2] * out.shape[-1]), out.shape[-2], out.shape[-1]
    flat = _addressable(dout.reshape(tokens, heads, head_dim))  # a copy only where the upstream does not flatten
    block_tokens = 64
    _backward_delta[(triton.cdiv(tokens, block_tokens), heads)](
        out,
        flat,
        dlse.contiguous() if dlse is not None else delta,
        delta,
        heads * head_dim,
        head_dim,
        flat.stride(0),
        flat.stride(1),
        tokens,
        out.shape[1] if out.ndim == 4 else tokens,
        heads,
        HAS_DLSE=dlse is not None,
        PACKED=out.ndim == 3,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_TOKENS=block_tokens,
        num_warps=4,
    )


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=torch.float32)


def _fake_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward_op = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale)"
    " -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? cu_seqlens, SymInt max_seqlen, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, causal, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (max_seqlen, causal, scale)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 7
    dout = torch.zeros_like(out) if dout is None else dout
    return (*_backward_op(dout, dlse, q, k, v, out, lse, cu_seqlens, *ctx.options), None, None, None, None)


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _documents(
    cu_seqlens: torch.Tensor, causal: bool, *tensors: torch.Tensor
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Each document's first token and length, and its part of the tensors: (tokens, heads, head_dim) ones as
    (1, heads, length, head_dim), and (heads, tokens) ones as (1, heads, length).

    Causal ones are padded with zeros, which no real query sees, to one of eight lengths in each power of two: PyTorch's
    CPU attention keeps compiled matrix products for every length that it has met, gigabytes of them in the end.
    """
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        length = end - start
        if length == 0:
            continue
        step = max(32, 1 << max(0, length.bit_length() - 4))
        padding = -length % step if causal else 0
        parts = []
        for x in tensors:
            part = x[start:end].transpose(0, 1) if x.ndim == 3 else x[:, start:end]
            parts.append(F.pad(part, (0, 0, 0, padding) if x.ndim == 3 else (0, padding))[None])
        yield start, length, parts


def _packed_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's CPU attention, document by document.

    This much of the reference is an op of its own because the loop depends on the values of `cu_seqlens`, which
    ``torch.compile`` cannot follow; nothing is lost, as attention is not fused with its neighbours anyway.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(_lse_shape(q), dtype=accumulation_dtype(q.dtype), device=q.device)
    for start, length, parts in _documents(cu_seqlens, causal, q, k, v):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, causal, scale=scale)
        out[start : start + length] = result[0, :, :length].transpose(0, 1)
        lse[:, start : start + length] = sums[0, :, :length]
    return out, lse


def _packed_cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # Padding has upstream gradient 0, and probabilities exp(0 − 0): it adds nothing to any gradient.
    for start, length, parts in _documents(cu_seqlens, causal, dout, q, k, v, out, lse):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, 0.0, causal, scale=scale
        )
        for whole, gradient in zip((dq, dk, dv), gradients, strict=True):
            whole[start : start + length] = gradient[0, :, :length].transpose(0, 1)
    if group > 1:
        dk, dv = (x.view(-1, kv_heads, group, x.shape[2]).sum(2) for x in (dk, dv))
    return dq, dk, dv


_packed_cpu_op = register(
    "attention_packed_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float scale)"
    " -> (Tensor, Tensor)",
    _packed_cpu,
    lambda q, k, v, cu_seqlens, causal, scale: (
        q.new_empty(q.shape),
        q.new_empty(_lse_shape(q), dtype=accumulation_dtype(q.dtype)),
    ),
)
_packed_cpu_backward_op = register(
    "attention_packed_cpu_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _packed_cpu_backward,
    lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _setup_packed_cpu(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, causal, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.options = (causal, scale)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _packed_cpu_gradients(ctx: Any, dout: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return (*_packed_cpu_backward_op(dout, *ctx.saved_tensors, *ctx.options), None, None, None)


differentiate(_packed_cpu_op, _packed_cpu_gradients, _setup_packed_cpu)
refuse_double_backward(_packed_cpu_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def qkv(batch: int, seq_q: int, seq_k: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        kv = (batch, seq_k, kv_heads, head_dim)
        return {"q": normal(batch, seq_q, heads, head_dim), "k": normal(*kv), "v": normal(*kv)}

    yield Sample("causal", qkv(1, 9, 9, 2, 2, 16))
    yield Sample("full", qkv(1, 7, 7, 2, 2, 16), {"causal": False})
    yield Sample("one token", qkv(1, 1, 1, 1, 1, 8))
    yield Sample("grouped query", qkv(2, 5, 5, 4, 2, 8), {"return_lse": True})
    yield Sample("three rows", qkv(3, 6, 6, 2, 1, 8))
    yield Sample("fewer queries", qkv(1, 3, 8, 2, 1, 16), {"scale": 0.3})
    yield Sample("more queries", qkv(1, 8, 3, 2, 1, 16), {"return_lse": True})
    yield Sample("127 tokens", qkv(1, 127, 127, 1, 1, 32))
    yield Sample("1000 tokens", qkv(1, 1000, 1000, 1, 1, 16))
    yield Sample("7 queries by 4097 keys", qkv(1, 7, 4097, 1, 1, 16))
    yield Sample("200 by 300, full", qkv(1, 200, 300, 2, 1, 64), {"causal": False})
    yield Sample("300 tokens, head_dim 80", qkv(1, 300, 300, 2, 1, 80))
    yield Sample("140 tokens, head_dim 256", qkv(1, 140, 140, 1, 1, 256))
    for lengths in ((5, 0, 1, 7), (100, 130, 1)):
        starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        packed = {name: x[0] for name, x in qkv(1, sum(lengths), sum(lengths), 4, 2, 16).items()}
        yield Sample(f"packed {lengths}", {**packed, "cu_seqlens": starts}, {"max_seqlen": max(lengths) + 2})
    fused = normal(2, 10, 8 * 16).view(2, 10, 8, 16)
    views = dict(zip(("q", "k", "v"), fused.split((4, 2, 2), dim=2), strict=True))
    yield Sample("views of a fused projection", views)


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for head_dim in (64, 128, 256):
        q = torch.empty(1, 8192, 16, head_dim, dtype=dtype)
        kv = q.new_empty(1, 8192, 4, head_dim)
        for causal in (True, False):
            yield Sample(f"8192x{head_dim} causal={causal}", {"q": q, "k": kv, "v": kv.clone()}, {"causal": causal})
        starts = torch.tensor([0, 4096, 8192], dtype=torch.int32)
        yield Sample(
            f"8192x{head_dim} packed",
            {"q": q[0], "k": kv[0], "v": kv[0].clone(), "cu_seqlens": starts},
            {"max_seqlen": 4096},
        )


def _flops(sample: Sample) -> int:
    """Two matrix products over the pairs of query and key that see each other, at 2 operations a multiply-add."""
    q, k = sample.tensors["q"], sample.tensors["k"]
    spans = [(q.shape[1], k.shape[1])] * q.shape[0]
    if "cu_seqlens" in sample.tensors:
        spans = [(length, length) for length in sample.tensors["cu_seqlens"].diff().tolist()]
    pairs = 0
    for seq_q, seq_k in spans:
        causal = sample.options.get("causal", True)
        # Query i sees min(seq_k, i + 1 + seq_k − seq_q) keys, and never fewer than none.
        pairs += sum(max(0, i + 1 + seq_k - seq_q) for i in range(seq_q)) if causal else seq_q * seq_k
    return 4 * pairs * q.shape[-2] * q.shape[-1]


SPEC = OpSpec(
    name="attention",
    function=attention,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    flops=_flops,
    compulsory_bytes=lambda sample: 2 * sample.nbytes("q") + sample.nbytes("k", "v"),
    strided=("q", "k", "v"),
    tables={"forward": _FORWARD, "backward dkv": _BACKWARD_DKV, "backward dq": _BACKWARD_DQ},
)
