"""PyTorch's own fused operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.benchmarks.kernels.providers.missing import NotServed, without

Tensor = torch.Tensor


def ready(device: torch.device) -> None:
    """PyTorch is always there."""


def _rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    without("F.rms_norm", weight_offset=weight_offset, residual=residual)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    without("F.layer_norm", residual=residual)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _cross_entropy(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, softcap: float | None = None, **options: Any
) -> Tensor:
    without("F.cross_entropy", z_loss=z_loss, softcap=softcap)
    return F.cross_entropy(logits, targets, **options)


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, z_loss: float = 0.0,
    softcap: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    without("F.linear_cross_entropy", z_loss=z_loss, softcap=softcap)
    # torch 2.13 on a CPU: 26 s forward and backward for 64 rows of 128,256 classes, whose plain logits take 0.2 s.
    # Which is also why it does not stand for linear_logprob.
    if options.get("reduction") == "none":
        raise NotServed("F.linear_cross_entropy takes seconds to work in chunks without a reduction")
    chunked = torch.nn.LinearCrossEntropyOptions()  # without options it is eager logits and F.cross_entropy
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=chunked, **options)
    return loss


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    without("SDPA", window=window, softcap=softcap)
    if sinks is not None or cu_seqlens is not None:
        raise NotServed(f"SDPA has no {'sinks' if sinks is not None else 'packed documents'}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, stochastic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """In place, unlike ours: PyTorch has no other."""
    without("torch's fused AdamW", stochastic=stochastic)
    if len({param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype}) > 1:
        raise NotServed("torch's fused AdamW takes one dtype")
    count = torch.full((), float(step), device=param.device)
    torch._fused_adamw_(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [count], lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    return param, exp_avg, exp_avg_sq


OPS: dict[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "rms_norm": _rms_norm,
}
