"""RMSNorm of each query and key head, then rotary positions, in one pass: how Qwen3 and Gemma-3 prepare attention.

For a head x of head_dim elements, with the weight of q or of k and the cosine c and sine s of its token and pair (see
`rms_norm` and `rotary`):

    rstd = 1 / sqrt(mean(x²) + eps)            n = x · rstd · (weight_offset + weight)
    first = n_first · c − n_second · s         second = n_second · c + n_first · s

The elements past the rotary dimensions are normalised and not turned: the kernels see them as pairs with c = 1, s = 0.

Backward, for an upstream gradient g, with x̂ = x · rstd, u = g turned back and v = u · (weight_offset + weight):

    u_first = g_first · c + g_second · s       u_second = g_second · c − g_first · s
    dx = rstd · (v − x̂ · mean(v · x̂))          dweight = Σ over tokens and heads of u · x̂

Nothing is saved but the inputs: x is read for x̂ anyhow, and its sum of squares then costs no more memory, where a saved
rstd would be written, kept and read again.

Shapes, strides and dtypes are those of `rotary`; the weights (head_dim,) are of the dtype of q or float32. All
arithmetic is float32 and the result is rounded once. The reference is rms_norm, then rotary, and rounds in between, as
models in plain PyTorch do (Gemma-3 there; Qwen3 there and once more before its weight). Weight gradients are summed in
float32, first per program over its tokens and heads, then over the programs in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tilewright.kernels.autocast import to_float32
from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors, is_number
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable, processors
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rms_norm import reference as normed
from tilewright.kernels.rotary import SPEC as ROTARY
from tilewright.kernels.rotary import HeadShape, batched, check_rotary, fused_samples, turned
from tilewright.kernels.rotary_tables import rotary_tables

if HAS_TRITON:
    import triton
    import triton.language as tl


def qk_norm_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise every head of queries and keys and turn it by the angles of its token's position.

    Args:
        q: (batch, seq, heads, head_dim) or (tokens, heads, head_dim).
        k: like q, with kv_heads instead of heads.
        q_weight: (head_dim,), of the dtype of q or float32; scales every head of q.
        k_weight: likewise, for k.
        cos: (max_positions, rotary_dim/2), of the dtype of q or float32, as `rotary_tables` makes it; no gradient.
        sin: likewise.
        eps: added to the mean square.
        weight_offset: added to both weights; 0.0 is Qwen3's, 1.0 Gemma-3's.
        positions: each token's position, int32 or int64, of shape q.shape[:-2]; None counts 0, 1, … along the sequence.
            A position outside the tables is an error on CPU (compiled, one that ends the process); on a GPU, where to
            look would mean to wait, it makes the rotated elements of its token NaN, and the weights' gradients.
        interleaved: pair the elements (2i, 2i + 1) instead of (i, i + rotary_dim/2).

    Returns:
        The normalised and rotated q and k, new tensors of their shapes and dtypes; float32 under autocast on CUDA.

    Raises:
        ValueError: a shape, dtype or device does not fit, the tables are too short or a number is out of its
            range; the message names the argument.
    """
    q, k, q_weight, k_weight, cos, sin = to_float32(q, k, q_weight, k_weight, cos, sin)
    check_rotary("qk_norm_rotary", q, k, cos, sin, positions)
    check_tensors("qk_norm_rotary", q_weight=q_weight, k_weight=k_weight)
    check_float("qk_norm_rotary", q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_shape("qk_norm_rotary", name, weight, q.shape[-1:], "the head_dim of q")
        check_same("qk_norm_rotary", "q", q, dtype=weight.dtype != torch.float32, **{name: weight})
    if not (is_number(eps) and eps >= 0):
        raise ValueError(f"qk_norm_rotary: eps is {eps!r}; it must be at least 0 and below 2⁶³")
    if not is_number(weight_offset):
        raise ValueError(f"qk_norm_rotary: weight_offset is {weight_offset!r}; it must be a number below 2⁶³ in size")
    if not runs_triton(q):
        return reference(
            q, k, q_weight, k_weight, cos, sin,
            eps=eps, weight_offset=weight_offset, positions=positions, interleaved=interleaved,
        )  # fmt: skip
    q_out, k_out = _forward_op(q, k, q_weight, k_weight, cos, sin, positions, eps, weight_offset, interleaved)
    return q_out, k_out


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    q_normed = normed(q, q_weight, eps=eps, weight_offset=weight_offset)
    k_normed = normed(k, k_weight, eps=eps, weight_offset=weight_offset)
    assert isinstance(q_normed, torch.Tensor)  # and not a pair: there is no residual
    assert isinstance(k_normed, torch.Tensor)
    return turned("qk_norm_rotary", q_normed, k_normed, cos, sin, positions, interleaved)


# By the width of one token's queries (heads · head_dim). A program takes whole tokens, so that it reads cos and sin
# once for all heads, in blocks of heads of about so many elements: 16 a thread of each tensor.
_TABLE = LaunchTable(
    "qk_norm_rotary token",
    {
        80: (
            Configuration(1024, 2, {"BLOCK_ELEMENTS": 1024}),
            Configuration(2048, 4, {"BLOCK_ELEMENTS": 2048}),
            Configuration(1 << 31, 8, {"BLOCK_ELEMENTS": 4096}),
        )
    },
    tuple(
        Configuration(1 << 31, warps, {"BLOCK_ELEMENTS": elements})
        for elements, warps in ((2048, 4), (2048, 8), (4096, 4))
    ),
)
# A processor's registers hold so many warps of the backward pass at a time (at most 128 registers a thread), and a
# program more would start when the others end.
_WARPS_PER_PROCESSOR = 16


if HAS_TRITON:

    @triton.jit
    def _forward(
        q_ptr,
        k_ptr,
        q_weight_ptr,
        k_weight_ptr,
        cos_ptr,
        sin_ptr,
        positions_ptr,
        q_out_ptr,
        k_out_ptr,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        positions_batch_stride,
        positions_seq_stride,
        tokens,
        seq,
        max_positions,
        eps,
        weight_offset,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_Q_HEADS: tl.constexpr,
        BLOCK_K_HEADS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        # [1, BLOCK_PAIRS], read once a program
        q_first, q_second = _load_pairs(q_weight_ptr, True, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS)
        k_first, k_second = _load_pairs(k_weight_ptr, True, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS)
        q_first, q_second = q_first + weight_offset, q_second + weight_offset
        k_first, k_second = k_first + weight_offset, k_second + weight_offset
        for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
            # int64: a token × its stride may pass 2³¹; divided before, since a division in int64 is slow.
            token = tl.cast(number, tl.int64)
            batch = tl.cast(number // seq, tl.int64)
            index = tl.cast(number % seq, tl.int64)
            cos, sin = _angles(
                cos_ptr, sin_ptr, positions_ptr + batch * positions_batch_stride + index * positions_seq_stride,
                index, max_positions, HALF, HAS_POSITIONS, BLOCK_PAIRS,
            )  # fmt: skip
            _forward_heads(
                q_ptr + batch * q_batch_stride + index * q_seq_stride, q_out_ptr + token * HEADS * HEAD_DIM,
                q_head_stride, q_first, q_second, cos, sin, eps,
                HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_Q_HEADS, BLOCK_PAIRS,
            )  # fmt: skip
            _forward_heads(
                k_ptr + batch * k_batch_stride + index * k_seq_stride, k_out_ptr + token * KV_HEADS * HEAD_DIM,
                k_head_stride, k_first, k_second, cos, sin, eps,
                KV_HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_K_HEADS, BLOCK_PAIRS,
            )  # fmt: skip

    @triton.jit
    def _backward(
        dq_out_ptr,
        dk_out_ptr,
        q_ptr,
        k_ptr,
        q_weight_ptr,
        k_weight_ptr,
        cos_ptr,
        sin_ptr,
        positions_ptr,
        dq_ptr,
        dk_ptr,
        dq_weight_ptr,
        dk_weight_ptr,
        dq_out_batch_stride,
        dq_out_seq_stride,
        dq_out_head_stride,
        dk_out_batch_stride,
        dk_out_seq_stride,
        dk_out_head_stride,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        positions_batch_stride,
        positions_seq_stride,
        tokens,
        seq,
        max_positions,
        eps,
        weight_offset,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_Q_HEADS: tl.constexpr,
        BLOCK_K_HEADS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        # [1, BLOCK_PAIRS], read once a program
        q_first, q_second = _load_pairs(q_weight_ptr, True, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS)
        k_first, k_second = _load_pairs(k_weight_ptr, True, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS)
        q_first, q_second = q_first + weight_offset, q_second + weight_offset
        k_first, k_second = k_first + weight_offset, k_second + weight_offset
        # Summed over the heads at the end: sooner, every token would have the warps wait for one another.
        dq_first = tl.zeros([BLOCK_Q_HEADS, BLOCK_PAIRS], tl.float32)
        dq_second = tl.zeros([BLOCK_Q_HEADS, BLOCK_PAIRS], tl.float32)
        dk_first = tl.zeros([BLOCK_K_HEADS, BLOCK_PAIRS], tl.float32)
        dk_second = tl.zeros([BLOCK_K_HEADS, BLOCK_PAIRS], tl.float32)
        for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
            token = tl.cast(number, tl.int64)
            batch = tl.cast(number // seq, tl.int64)
            index = tl.cast(number % seq, tl.int64)
            cos, sin = _angles(
                cos_ptr, sin_ptr, positions_ptr + batch * positions_batch_stride + index * positions_seq_stride,
                index, max_positions, HALF, HAS_POSITIONS, BLOCK_PAIRS,
            )  # fmt: skip
            dq_first, dq_second = _backward_heads(
                dq_out_ptr + batch * dq_out_batch_stride + index * dq_out_seq_stride,
                q_ptr + batch * q_batch_stride + index * q_seq_stride, dq_ptr + token * HEADS * HEAD_DIM,
                dq_out_head_stride, q_head_stride, q_first, q_second, cos, sin, eps,
                dq_first, dq_second, HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_Q_HEADS, BLOCK_PAIRS,
            )  # fmt: skip
            dk_first, dk_second = _backward_heads(
                dk_out_ptr + batch * dk_out_batch_stride + index * dk_out_seq_stride,
                k_ptr + batch * k_batch_stride + index * k_seq_stride, dk_ptr + token * KV_HEADS * HEAD_DIM,
                dk_out_head_stride, k_head_stride, k_first, k_second, cos, sin, eps,
                dk_first, dk_second, KV_HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_K_HEADS, BLOCK_PAIRS,
            )  # fmt: skip
        dq_weight_ptr += tl.program_id(0) * HEAD_DIM
        dk_weight_ptr += tl.program_id(0) * HEAD_DIM
        dq_first, dq_second = tl.sum(dq_first, 0, keep_dims=True), tl.sum(dq_second, 0, keep_dims=True)
        dk_first, dk_second = tl.sum(dk_first, 0, keep_dims=True), tl.sum(dk_second, 0, keep_dims=True)
        _store_pairs(dq_weight_ptr, True, dq_first, dq_second, HEAD_DIM, HALF, INTERLEAVED, 1, BLOCK_PAIRS)
        _store_pairs(dk_weight_ptr, True, dk_first, dk_second, HEAD_DIM, HALF, INTERLEAVED, 1, BLOCK_PAIRS)

    @triton.jit
    def _forward_heads(
        x_ptr,
        out_ptr,
        head_stride,
        scale_first,
        scale_second,
        cos,
        sin,
        eps,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        """Normalise and turn all heads of the token that starts at `x_ptr`."""
        for start in range(0, HEADS, BLOCK_HEADS):
            head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
            # [BLOCK_HEADS, BLOCK_PAIRS]
            first, second = _load_pairs(
                x_ptr + head * head_stride, head < HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS
            )
            rstd = tl.rsqrt(tl.sum(first * first + second * second, 1, keep_dims=True) / HEAD_DIM + eps)
            first = first * rstd * scale_first
            second = second * rstd * scale_second
            _store_pairs(
                out_ptr + head * HEAD_DIM, head < HEADS, first * cos - second * sin, second * cos + first * sin,
                HEAD_DIM, HALF, INTERLEAVED, BLOCK_HEADS, BLOCK_PAIRS,
            )  # fmt: skip

    @triton.jit
    def _backward_heads(
        dout_ptr,
        x_ptr,
        dx_ptr,
        dout_head_stride,
        x_head_stride,
        scale_first,
        scale_second,
        cos,
        sin,
        eps,
        dweight_first,
        dweight_second,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        """The input's gradient at all heads of one token; returns the weight's, with the token's share added."""
        for start in range(0, HEADS, BLOCK_HEADS):
            head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
            # [BLOCK_HEADS, BLOCK_PAIRS]
            x_first, x_second = _load_pairs(
                x_ptr + head * x_head_stride, head < HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS
            )
            g_first, g_second = _load_pairs(
                dout_ptr + head * dout_head_stride, head < HEADS, HEAD_DIM, HALF, INTERLEAVED, BLOCK_PAIRS
            )
            rstd = tl.rsqrt(tl.sum(x_first * x_first + x_second * x_second, 1, keep_dims=True) / HEAD_DIM + eps)
            x_first *= rstd
            x_second *= rstd
            u_first = g_first * cos + g_second * sin
            u_second = g_second * cos - g_first * sin
            dweight_first += u_first * x_first
            dweight_second += u_second * x_second
            v_first = u_first * scale_first
            v_second = u_second * scale_second
            mean = tl.sum(v_first * x_first + v_second * x_second, 1, keep_dims=True) / HEAD_DIM
            _store_pairs(
                dx_ptr + head * HEAD_DIM, head < HEADS, rstd * (v_first - x_first * mean),
                rstd * (v_second - x_second * mean), HEAD_DIM, HALF, INTERLEAVED, BLOCK_HEADS, BLOCK_PAIRS,
            )  # fmt: skip
        return dweight_first, dweight_second

    @triton.jit
    def _angles(
        cos_ptr,
        sin_ptr,
        position_ptr,
        index,
        max_positions,
        HALF: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        """cos and sin of one token's pairs, float32 [1, BLOCK_PAIRS]: 1 and 0 past the rotary dimensions."""
        pair = tl.arange(0, BLOCK_PAIRS)[None, :]
        mask = pair < HALF
        if HAS_POSITIONS:
            position = tl.load(position_ptr).to(tl.int64)
            in_table = (position >= 0) & (position < max_positions)
            inside = pair < tl.where(in_table, HALF, 0)
            cos = tl.load(cos_ptr + position * HALF + pair, mask=inside, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + position * HALF + pair, mask=inside, other=0.0).to(tl.float32)
            # Outside the table NaN, which is seen, rather than another tensor's memory, which is not.
            cos = tl.where(mask & (in_table == 0), float("nan"), cos)
        else:
            cos = tl.load(cos_ptr + index * HALF + pair, mask=mask, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + index * HALF + pair, mask=mask, other=0.0).to(tl.float32)
        return cos, sin

    @triton.jit
    def _load_pairs(
        head_ptr,
        is_head,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        """The first and the second elements of all pairs of the heads at `head_ptr`, float32 [heads, BLOCK_PAIRS]."""
        if INTERLEAVED:
            # Whole pairs are loaded and parted in registers: two loads with a stride of 2 would fetch twice.
            element = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
            x = tl.load(head_ptr + element, mask=is_head & (element < HEAD_DIM), other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK_PAIRS, 2]))
        else:
            first_at, second_at, is_first, is_second = _halves(HEAD_DIM, HALF, BLOCK_PAIRS)
            first = tl.load(head_ptr + first_at, mask=is_head & is_first, other=0.0).to(tl.float32)
            second = tl.load(head_ptr + second_at, mask=is_head & is_second, other=0.0).to(tl.float32)
        return first, second

    @triton.jit
    def _store_pairs(
        head_ptr,
        is_head,
        first,
        second,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_PAIRS: tl.constexpr,
    ):
        """Store pairs where `_load_pairs` finds them."""
        dtype = head_ptr.dtype.element_ty
        if INTERLEAVED:
            element = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
            x = tl.reshape(tl.join(first, second), [BLOCK_HEADS, 2 * BLOCK_PAIRS])
            tl.store(head_ptr + element, x.to(dtype), mask=is_head & (element < HEAD_DIM))
        else:
            first_at, second_at, is_first, is_second = _halves(HEAD_DIM, HALF, BLOCK_PAIRS)
            tl.store(head_ptr + first_at, first.to(dtype), mask=is_head & is_first)
            tl.store(head_ptr + second_at, second.to(dtype), mask=is_head & is_second)

    @triton.jit
    def _halves(HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
        """Where the elements of each pair stand in a head of the half layout, [1, BLOCK_PAIRS], and whether they do.

        What is past the rotary dimensions is paired in halves too.
        """
        REST: tl.constexpr = (HEAD_DIM - 2 * HALF + 1) // 2
        pair = tl.arange(0, BLOCK_PAIRS)[None, :]
        first = pair + tl.where(pair < HALF, 0, HALF)
        second = first + tl.where(pair < HALF, HALF, REST)
        return first, second, pair < HALF + REST, (pair < HALF + REST) & (second < HEAD_DIM)


def _shared_arguments(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, positions: torch.Tensor | None, interleaved: bool
) -> tuple[int, torch.Tensor, dict[str, Any]]:
    """Of both passes over q and k (batch, seq, heads, head_dim): the number of programs, the positions as (batch, seq)
    and the constexprs."""
    batch, seq, heads, head_dim = q.shape
    kv_heads, half = k.shape[2], cos.shape[1]
    configuration = _TABLE.pick(heads * head_dim, q.device)
    block_heads = max(1, configuration.blocks["BLOCK_ELEMENTS"] // triton.next_power_of_2(head_dim))
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "HAS_POSITIONS": positions is not None,
        "INTERLEAVED": interleaved,
        "BLOCK_Q_HEADS": min(block_heads, triton.next_power_of_2(max(1, heads))),
        "BLOCK_K_HEADS": min(block_heads, triton.next_power_of_2(max(1, kv_heads))),
        "BLOCK_PAIRS": triton.next_power_of_2((head_dim + 1) // 2),
        "num_warps": configuration.num_warps,
    }
    programs = min(batch * seq, max(1, _WARPS_PER_PROCESSOR // configuration.num_warps) * processors(q.device))
    where = q if positions is None else positions.reshape(-1, seq)  # q stands in for what is never read
    return programs, where, constants


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q, k = batched(q), batched(k)
    batch, seq = q.shape[:2]
    if batch * seq == 0:
        return q_out, k_out
    programs, where, constants = _shared_arguments(q, k, cos, positions, interleaved)
    _forward[(programs,)](
        q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), where, q_out, k_out,
        *q.stride()[:3], *k.stride()[:3], *where.stride()[:2], batch * seq, seq, cos.shape[0], eps, weight_offset,
        **constants,
    )  # fmt: skip
    return q_out, k_out


def _launch_backward(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dq_out, dk_out, q, k = batched(dq_out), batched(dk_out), batched(q), batched(k)
    batch, seq = q.shape[:2]
    if batch * seq == 0:
        return dq, dk, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    programs, where, constants = _shared_arguments(q, k, cos, positions, interleaved)
    # A program's share of each weight's gradient.
    dq_weight, dk_weight = torch.empty(2, programs, q.shape[-1], dtype=torch.float32, device=q.device)
    _backward[(programs,)](
        dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), where,
        dq, dk, dq_weight, dk_weight, *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
        *where.stride()[:2], batch * seq, seq, cos.shape[0], eps, weight_offset, **constants,
    )  # fmt: skip
    return dq, dk, dq_weight.sum(0).to(q_weight.dtype), dk_weight.sum(0).to(k_weight.dtype)


def _fake_forward(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, q_weight, k_weight))


_forward_op = register(
    "qk_norm_rotary(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions,"
    " float eps, float weight_offset, bool interleaved) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "qk_norm_rotary_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
    " Tensor cos, Tensor sin, Tensor? positions, float eps, float weight_offset, bool interleaved)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.weight_offset, ctx.interleaved = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor) -> tuple[Any, ...]:
    gradients = _backward_op(dq_out, dk_out, *ctx.saved_tensors, ctx.eps, ctx.weight_offset, ctx.interleaved)
    return *gradients, None, None, None, None, None, None


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def with_weights(q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"q": q, "k": k, "q_weight": normal(q.shape[-1]), "k_weight": normal(q.shape[-1])}

    def heads(lead: tuple[int, ...], q: int, k: int, head_dim: int) -> dict[str, torch.Tensor]:
        return with_weights(normal(*lead, q, head_dim), normal(*lead, k, head_dim))

    def fused(lead: tuple[int, ...], q: int, k: int, head_dim: int) -> dict[str, torch.Tensor]:
        projected = normal(*lead, (q + 2 * k) * head_dim).unflatten(-1, (q + 2 * k, head_dim))
        return with_weights(projected[..., :q, :], projected[..., q : q + k, :])

    def tables(positions: int, rotary_dim: int) -> dict[str, torch.Tensor]:
        cos, sin = rotary_tables(positions, rotary_dim, base=100.0, device=device)
        return {"cos": cos.to(dtype), "sin": sin.to(dtype)}

    yield Sample("one token", {**heads((1, 1), 1, 1, 2), **tables(1, 2)})
    yield Sample("19 tokens", {**heads((19,), 3, 1, 8), **tables(127, 8)})
    mixed = frozenset({"q_weight", "k_weight", "cos", "sin"})
    shared = torch.randint(0, 50, (1, 3), device=device, dtype=torch.int32).expand(2, 3)
    positions = {"half": torch.randint(0, 50, (2, 3), device=device), "interleaved": shared}
    for layout in positions:
        options = {"interleaved": layout == "interleaved"}
        gemma = {**options, "weight_offset": 1.0, "eps": 1e-5}
        packed = {**fused((2, 3), 4, 2, 16), **tables(50, 12), "positions": positions[layout]}
        yield Sample(f"{layout}, fused, positions", packed, options, mixed)
        yield Sample(f"{layout}, partial, offset", {**heads((1, 2), 7, 1, 127), **tables(2, 26)}, gemma)
        yield Sample(f"{layout}, head_dim 1000", {**heads((2,), 3, 3, 1000), **tables(2, 1000)}, options)
        yield Sample(f"{layout}, head_dim 4097", {**heads((1, 2), 2, 1, 4097), **tables(2, 4000)}, options)
    yield Sample("three rows", {**heads((3, 2), 2, 1, 8), **tables(3, 8)})
    yield Sample("no rows", {**heads((0, 2), 2, 1, 8), **tables(3, 8)})
    strided = with_weights(normal(2, 2, 3, 256).transpose(1, 2), normal(1, 3, 1, 512).expand(2, 3, 1, 512)[..., ::2])
    yield Sample("heads before tokens, elements apart", {**strided, **tables(4, 256)})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    others = {
        "Qwen3 8B, positions": HeadShape(32, 8, 128, 128, positions=True),
        "Qwen3 30B-A3B, interleaved": HeadShape(32, 4, 128, 128, interleaved=True),
        "Gemma-3 12B, positions": HeadShape(16, 8, 256, 256, positions=True),
        "Gemma-3 1B": HeadShape(4, 1, 256, 256),
        "16 heads, partly turned": HeadShape(16, 4, 96, 32, positions=True),
    }
    for sample in fused_samples(others, dtype, small):
        q_weight, k_weight = torch.empty(2, sample.tensors["q"].shape[-1])
        tensors = {**sample.tensors, "q_weight": q_weight, "k_weight": k_weight}
        yield Sample(sample.label, tensors, sample.options, frozenset({"q_weight", "k_weight", "cos", "sin"}))


def _work(sample: Sample) -> Passes:
    """What rotary does and moves, the weights in, and for each element its square, the sum and two products. Backward
    reads q and k again besides, and writes the weights' gradients."""
    turned = ROTARY.work(sample).forward
    weights = sample.nbytes("q_weight", "k_weight")
    elements = sample.tensors["q"].numel() + sample.tensors["k"].numel()
    return Passes(
        Work(turned.flops + 4 * elements, turned.bytes + weights),
        Work(turned.flops + 10 * elements, turned.bytes + 2 * weights + sample.nbytes("q", "k")),
    )


SPEC = OpSpec(
    name="qk_norm_rotary",
    function=qk_norm_rotary,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("q", "k"),
    no_gradient=frozenset({"cos", "sin"}),
    tables={"token": _TABLE},
)
