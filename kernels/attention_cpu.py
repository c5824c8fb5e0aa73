"""Packed attention on CPU with PyTorch's own kernels, document by document: the part of attention's reference that has
to be an op of its own.

The loop depends on the values of `cu_seqlens`, which ``torch.compile`` cannot follow; nothing is lost by an opaque op,
as attention is not fused with its neighbours anyway. Plain causal and full attention only; calls with other options
stay with `tilewright.kernels.attention.reference`.

PyTorch's CPU attention computes in float32 where a CPU has no matrix unit, and takes three times as long as products in
bfloat16 would. Long bfloat16 documents therefore go through `torch.bmm`, a block of queries at a time. It rounds its
results to bfloat16, far too coarse for scores of 10 or 20; but the difference to the row's largest score may be rounded
so, for what weighs in a softmax is near it. The difference comes out of the product itself, summed in float32, by one
more dimension:

    s_ij − c_i = (scale · q_i, −c_i) · (k_j, 1)        c_i = max_j s_ij, from a first product

and likewise in the backward pass, δ_i in two parts that bfloat16 can hold:

    p_ij (dp_ij − δ_i):    dp_ij − δ_i = (do_i, −δ_i) · (v_j, 1)        δ_i = do_i · out_i
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.native import library
from tilewright.kernels.rows import accumulation_dtype

_SOURCE = Path(__file__).with_suffix(".cpp")


class _Documents(NamedTuple):
    """Documents that are padded to one length and worked on together."""

    spans: list[slice]
    length: int

    def gather(self, x: torch.Tensor, *further: float, scale: float = 1.0) -> torch.Tensor:
        """scale · x (tokens, heads, head_dim) as (documents · heads, length, head_dim), with one more dimension for
        each number of `further`, which it holds; and (heads, tokens) as (documents · heads, length). Padding is 0."""
        heads = x.shape[1 if x.ndim == 3 else 0]
        dims = (x.shape[2] + len(further),) if x.ndim == 3 else ()
        gathered = x.new_empty(len(self.spans), heads, self.length, *dims)
        room = gathered[..., : x.shape[2]] if further else gathered
        if (whole := self._in_one(x)) is not None:
            room.copy_(whole)
        else:
            for document, span in zip(room, self.spans, strict=True):
                part = x[span].transpose(0, 1) if x.ndim == 3 else x[:, span]
                document[:, part.shape[1] :] = 0.0
                document[:, : part.shape[1]] = part
        if scale != 1.0:
            gathered.mul_(scale)  # all of it: faster than what is strided
        for place, number in enumerate(further, -len(further)):
            gathered[..., place] = number
        return gathered.flatten(0, 1)

    def scatter(self, gathered: torch.Tensor, x: torch.Tensor) -> None:
        """Write what `gather` would take apart back into `x`."""
        gathered = gathered.unflatten(0, (len(self.spans), -1))
        if (whole := self._in_one(x)) is not None:
            whole.copy_(gathered)
            return
        for span, part in zip(self.spans, gathered, strict=True):
            part = part[:, : span.stop - span.start]
            if x.ndim == 3:
                x[span] = part.transpose(0, 1)
            else:
                x[:, span] = part

    def _in_one(self, x: torch.Tensor) -> torch.Tensor | None:
        """The documents' part of `x` as (documents, heads, length, …), where they follow each other without padding."""
        first = self.spans[0].start
        starts = range(first, first + len(self.spans) * self.length, self.length)
        if self.spans != [slice(start, start + self.length) for start in starts]:
            return None
        tokens = x.narrow(0 if x.ndim == 3 else 1, first, len(self.spans) * self.length)
        parts: torch.Tensor = tokens.unflatten(0 if x.ndim == 3 else 1, (-1, self.length))
        return parts.transpose(1, 2) if x.ndim == 3 else parts.transpose(0, 1)


def _documents(cu_seqlens: torch.Tensor, causal: bool) -> Iterator[_Documents]:
    """All documents that have tokens, by length.

    Causal ones are padded with zeros, which no real query sees, to one of eight lengths in each power of two: PyTorch's
    CPU attention keeps compiled matrix products for every length that it has met, gigabytes of them in the end.
    """
    by_length: dict[int, list[slice]] = {}
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        length = end - start
        step = max(32, 1 << max(0, length.bit_length() - 4))
        if length:
            by_length.setdefault(length + (-length % step if causal else 0), []).append(slice(start, end))
    return (_Documents(spans, length) for length, spans in by_length.items())


# Shorter documents are left to PyTorch's attention, as their products are too small to gain anything, and longer ones,
# for whose every block of queries all gradients of keys and values would be read and written.
_LONG = range(256, 2049)
# Scores that exist at a time: about what a CPU's caches hold.
_SCORES = 1 << 21


def _block_queries(length: int) -> int:
    """Queries that are worked on at a time: all of a short document, which is one product instead of two small ones;
    of a longer one so many that few of their scores are in the future."""
    return 256 if length <= 256 else 128


def _is_long(documents: _Documents, q: torch.Tensor) -> bool:
    """Whether documents of q's dtype go through products in bfloat16."""
    if documents.length not in _LONG or q.dtype != torch.bfloat16:
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and library(_SOURCE) is not None


def _compiled() -> ctypes.CDLL:
    compiled = library(_SOURCE)
    assert compiled is not None  # as `_is_long` has seen
    return compiled


def _head_spans(q: torch.Tensor) -> list[slice]:
    """Heads that are worked on together."""
    step = max(1, _SCORES // (_block_queries(q.shape[1]) * q.shape[1]))
    return [slice(first, first + step) for first in range(0, q.shape[0], step)]


class _Blocks:
    """The blocks of queries (heads, length, dims) of one document, and room for two products of each with its keys."""

    def __init__(self, q: torch.Tensor, causal: bool) -> None:
        heads, self.length, _ = q.shape
        self.causal = causal
        self.step = _block_queries(self.length)
        self.room = q.new_empty(2, heads * self.step * self.length)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Each block's queries, and the keys that they may see."""
        for first in range(0, self.length, self.step):
            end = min(first + self.step, self.length)
            yield slice(first, end), slice(0, end if self.causal else self.length)

    def product(self, rows: torch.Tensor, columns: torch.Tensor, place: int = 0) -> torch.Tensor:
        """rows · columnsᵀ (heads, queries, keys), in one of the two rooms."""
        shape = (rows.shape[0], rows.shape[1], columns.shape[1])
        out = self.room[place, : rows.shape[0] * rows.shape[1] * columns.shape[1]].view(shape)
        return torch.bmm(rows, columns.mT, out=out)

    def largest(self, scores: torch.Tensor, largest: torch.Tensor, negative: torch.Tensor) -> None:
        """Write the largest score that each query sees to `largest` (heads, queries), and its negative."""
        _compiled().tilewright_attention_largest(
            *self._rows(scores),
            ctypes.c_void_p(largest.data_ptr()), *map(ctypes.c_int64, largest.stride()),
            ctypes.c_void_p(negative.data_ptr()), *map(ctypes.c_int64, negative.stride()),
            torch.get_num_threads(),
        )  # fmt: skip

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """In the place of scores of which the row's largest has been taken off; 0 where a key is in the future."""
        _compiled().tilewright_attention_softmax(*self._rows(scores), torch.get_num_threads())
        return scores

    def _rows(self, scores: torch.Tensor) -> tuple[Any, ...]:
        return ctypes.c_void_p(scores.data_ptr()), *map(ctypes.c_int64, scores.shape), int(self.causal)


def _long_forward(
    documents: _Documents, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, gathered, and each query's largest score (documents · heads, length)."""
    # Two dimensions more, one of them for nothing: products take them in pairs.
    q, k = documents.gather(q, 0.0, 0.0, scale=scale), documents.gather(k, 1.0, 1.0)
    v = documents.gather(v)
    out, largest = torch.empty_like(v), q.new_empty(q.shape[:2])
    for heads in _head_spans(q):
        blocks = _Blocks(q[heads], causal)
        for queries, keys in blocks:
            # Contiguous, or each product would make a copy of its own.
            q_block, k_block = q[heads, queries].contiguous(), k[heads, keys].contiguous()
            blocks.largest(blocks.product(q_block, k_block), largest[heads, queries], q_block[..., -2])
            out[heads, queries] = blocks.softmax(blocks.product(q_block, k_block)) @ v[heads, keys]
    return out, largest


def _long_backward(
    documents: _Documents,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    largest: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, gathered; those of k and v in float32."""
    delta = documents.gather((dout.float() * out).sum(-1).t(), scale=-1.0)
    coarse = delta.to(dout.dtype)
    dout, q, k, v = (
        documents.gather(dout, 0.0, 0.0), documents.gather(q, 0.0, 0.0, scale=scale),
        documents.gather(k, 1.0, 1.0), documents.gather(v, 1.0, 1.0),
    )  # fmt: skip
    dout[..., -2], dout[..., -1] = coarse, delta - coarse
    q[..., -2] = documents.gather(largest, scale=-1.0)
    width = q.shape[-1] - 2
    dq = q.new_empty(*q.shape[:2], width)
    dk, dv = (torch.empty(dq.shape, dtype=torch.float32) for _ in range(2))
    for heads in _head_spans(q):
        blocks = _Blocks(q[heads], causal)
        # From the last, whose queries see all keys, and so begin the sums.
        for number, (queries, keys) in enumerate(reversed(list(blocks))):
            q_block, dout_block = q[heads, queries].contiguous(), dout[heads, queries].contiguous()
            k_block, v_block = k[heads, keys].contiguous(), v[heads, keys].contiguous()
            p = blocks.softmax(blocks.product(q_block, k_block))
            dv_block = p.mT @ dout_block[..., :width]
            dscores = blocks.product(dout_block, v_block, place=1).mul_(p)
            dk_block = dscores.mT @ q_block[..., :width]
            torch.mul(dscores @ k_block[..., :width], scale, out=dq[heads, queries])
            # Not `+=`, which would copy the sums onto themselves.
            for whole, block in ((dk, dk_block), (dv, dv_block)):
                whole[heads, keys].add_(block) if number else whole[heads].copy_(block)
    return dq, dk, dv


def _short_forward(
    documents: _Documents, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, gathered."""
    q, k, v = (documents.gather(x)[None] for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[0], lse[0]


def _short_backward(
    documents: _Documents,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v, gathered."""
    gathered = (documents.gather(x)[None] for x in (dout, q, k, v, out, lse))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*gathered, 0.0, causal, scale=scale)
    return tuple(gradient[0] for gradient in gradients)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and, for the backward pass, lse (heads, tokens); of long documents their largest scores. Key heads are
    repeated for their groups."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype), device=q.device)
    for documents in _documents(cu_seqlens, causal):
        forward = _long_forward if _is_long(documents, q) else _short_forward
        for result, whole in zip(forward(documents, q, k, v, causal, scale), (out, lse), strict=True):
            documents.scatter(result, whole)
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
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # Padding has upstream gradient 0, and probabilities exp(0 − 0): it adds nothing to any gradient.
    for documents in _documents(cu_seqlens, causal):
        backward = _long_backward if _is_long(documents, q) else _short_backward
        gradients = backward(documents, dout, q, k, v, out, lse, causal, scale)
        for gradient, whole in zip(gradients, (dq, dk, dv), strict=True):
            documents.scatter(gradient, whole)
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
