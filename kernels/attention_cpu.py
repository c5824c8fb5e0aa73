"""Packed attention on CPU with PyTorch's own kernels, document by document: the part of attention's reference that has
to be an op of its own.

The loop depends on the values of `cu_seqlens`, which ``torch.compile`` cannot follow; nothing is lost by an opaque op,
as attention is not fused with its neighbours anyway. Plain causal and full attention only; calls with other options
stay with `tilewright.kernels.attention.reference`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.rows import accumulation_dtype


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


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of each document, with key heads repeated for their groups."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype), device=q.device)
    for start, length, parts in _documents(cu_seqlens, causal, q, k, v):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, causal, scale=scale)
        out[start : start + length] = result[0, :, :length].transpose(0, 1)
        lse[:, start : start + length] = sums[0, :, :length]
    return out, lse


def _backward(
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
        dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv


packed_cpu = register(
    "attention_packed_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float scale)"
    " -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, cu_seqlens, causal, scale: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype)),
    ),
)
_backward_op = register(
    "attention_packed_cpu_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, causal, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.options = (causal, scale)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _gradients(ctx: Any, dout: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors, *ctx.options), None, None, None)


differentiate(packed_cpu, _gradients, _setup_context)
refuse_double_backward(_backward_op)
