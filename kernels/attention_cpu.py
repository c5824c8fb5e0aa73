"""Packed attention on CPU, document by document: the part of attention's reference that has to be an op of its own.

The loop depends on the values of `cu_seqlens`, which ``torch.compile`` cannot follow; nothing is lost by an opaque op,
as attention is not fused with its neighbours anyway. Plain causal and full attention only; calls with other options
stay with `tilewright.kernels.attention.reference`.

PyTorch's CPU attention computes in float32 where a CPU has no matrix unit, on copies of the documents that are padded
to one length. A processor that multiplies bfloat16 numbers takes those where they lie, in `attention_cpu.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tilewright.kernels.checks import check_starts
from tilewright.kernels.dispatch import demanded
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.native import library
from tilewright.kernels.rows import accumulation_dtype

_SOURCE = Path(__file__).with_suffix(".cpp")


class _Packed(ctypes.Structure):
    """``struct Packed`` of the source: (tokens, heads, head_dim), the numbers of a head beside each other."""

    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Sizes(ctypes.Structure):
    """``struct Sizes`` of the source."""

    _fields_ = [
        ("starts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("documents", "tokens", "heads", "key_heads", "dim")),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    """The source, where the processor can do what it asks for."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    compiled = library(_SOURCE, "-mavx512bf16")
    return compiled if compiled is not None and compiled.tilewright_attention_serves() else None


def _serves(q: torch.Tensor) -> bool:
    """Whether q and its keys and values go through the source, where nothing else is demanded."""
    fitting = q.dtype == torch.bfloat16 and q.shape[2] % 16 == 0 and q.numel() > 0
    return fitting and not demanded() and _compiled() is not None


def _call(
    function: str,
    inputs: list[torch.Tensor],
    lse: torch.Tensor,
    results: list[torch.Tensor],
    key_heads: int,
    cu_seqlens: torch.Tensor,
    causal: bool,
    scale: float,
) -> None:
    """A function of the source; `lse` and `results` are contiguous."""
    inputs = [x if x.stride(2) == 1 else x.contiguous() for x in inputs]
    starts = cu_seqlens.to(torch.int64).contiguous()
    tokens, heads, dim = inputs[0].shape
    sizes = _Sizes(starts.data_ptr(), len(starts) - 1, tokens, heads, key_heads, dim, causal, scale)
    packed = [ctypes.byref(_Packed(x.data_ptr(), x.stride(0), x.stride(1))) for x in (*inputs, *results)]
    getattr(_compiled(), function)(
        ctypes.byref(sizes), *packed[: len(inputs)], ctypes.c_void_p(lse.data_ptr()), *packed[len(inputs) :],
        torch.get_num_threads(),
    )  # fmt: skip


class _Documents(NamedTuple):
    """Documents that are padded to one length and worked on together."""

    spans: list[slice]
    length: int

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, heads, head_dim) as (1, documents · heads, length, head_dim), and (heads, tokens) as
        (1, documents · heads, length). Padding is 0."""
        heads = x.shape[1 if x.ndim == 3 else 0]
        gathered = x.new_empty(len(self.spans), heads, self.length, *(x.shape[2:] if x.ndim == 3 else ()))
        if (whole := self._in_one(x)) is not None:
            gathered.copy_(whole)
        else:
            for document, span in zip(gathered, self.spans, strict=True):
                part = x[span].transpose(0, 1) if x.ndim == 3 else x[:, span]
                document[:, part.shape[1] :] = 0.0
                document[:, : part.shape[1]] = part
        return gathered.flatten(0, 1)[None]

    def scatter(self, gathered: torch.Tensor, x: torch.Tensor) -> None:
        """Write what `gather` would take apart back into `x`."""
        gathered = gathered[0].unflatten(0, (len(self.spans), -1))
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


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and, for the backward pass, lse (heads, tokens)."""
    check_starts("attention", cu_seqlens, q.shape[0])  # which nobody could while the call was being compiled
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype), device=q.device)
    if _serves(q):
        _call("tilewright_attention_forward", [q, k, v, out], lse, [], k.shape[1], cu_seqlens, causal, scale)
        return out, lse
    group = q.shape[1] // k.shape[1]
    # Key heads are repeated for their groups.
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    for documents in _documents(cu_seqlens, causal):
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(documents.gather, (q, k, v)), 0.0, causal, scale=scale
        )
        for result, whole in zip(results, (out, lse), strict=True):
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
    if _serves(q):
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        inputs = [dout, q, k, v, out]
        _call("tilewright_attention_backward", inputs, lse, gradients, k.shape[1], cu_seqlens, causal, scale)
        dq, dk, dv = gradients
        return dq, dk, dv
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # Padding has upstream gradient 0, and probabilities exp(0 − 0): it adds nothing to any gradient.
    for documents in _documents(cu_seqlens, causal):
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(documents.gather, (dout, q, k, v, out, lse)), 0.0, causal, scale=scale
        )
        for gradient, whole in zip(results, (dq, dk, dv), strict=True):
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
