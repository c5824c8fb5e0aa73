"""flash-linear-attention's counterparts of our ops, with their defaults.

Left out, for want of a counterpart: norms of rows past 64 KiB, which it refuses, rotary at given positions, attention
that is not causal or has a softcap, the loss of each row and other divergences than the forward one in its fused heads,
GEGLU, and squared ReLU, which it leaves to `torch.compile`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch

from tilewright.benchmarks.audit.peers.counterpart import Counterpart, contiguous
from tilewright.kernels.opspec import Sample

MATMULS = {
    "attention": {
        "_forward": 2,
        "parallel_attn_fwd_kernel": 2,
        "parallel_attn_bwd_kernel_dkv": 4,
        "parallel_attn_bwd_kernel_dq": 3,
    }
}
_ROW_BYTES = 64 * 1024


def counterparts() -> tuple[Counterpart, ...]:
    """Import flash-linear-attention and name its counterparts."""
    activations = importlib.import_module("fla.modules.activations")
    norms = importlib.import_module("fla.modules.norm.layernorm")
    rotations = importlib.import_module("fla.modules.rotary")
    losses = importlib.import_module("fla.modules.fused_cross_entropy")
    fused_heads = importlib.import_module("fla.modules.fused_linear_cross_entropy.ops")
    distillation = importlib.import_module("fla.modules.fused_kl_div.ops")
    attentions = importlib.import_module("fla.ops.attn")

    def rms_norm(x: Any, weight: Any, residual: Any = None) -> Any:
        return norms.rms_norm(x, weight, None, residual, eps=1e-6, prenorm=residual is not None)

    def layer_norm(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        return norms.layer_norm(x, weight, bias, residual, prenorm=residual is not None)

    def cross_entropy(logits: Any, targets: Any, *, z_loss: float = 0.0, softcap: Any = None, **options: Any) -> Any:
        return losses.FusedCrossEntropyLoss(lse_square_scale=z_loss, logit_softcapping=softcap, **options)(
            logits, targets
        )

    def linear_cross_entropy(hidden: Any, weight: Any, targets: Any, *, reduction: str) -> Any:
        return fused_heads.fused_linear_cross_entropy_loss(hidden, targets, weight, reduction=reduction)

    def linear_kl(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, *, divergence: str) -> Any:
        return distillation.fused_kl_div_loss(hidden, teacher_hidden.detach(), weight, teacher_weight.detach())

    def rotary(q: Any, k: Any, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> Any:
        return tuple(rotations.rotary_embedding(x, cos, sin, interleaved=interleaved) for x in (q, k))

    def attention(q: Any, k: Any, v: Any, cu_seqlens: Any = None, sinks: Any = None, **options: Any) -> Any:
        return attentions.parallel_attn(
            q, k, v, window_size=options.get("window"), cu_seqlens=cu_seqlens, sink_bias=sinks
        )

    return (
        Counterpart("rms_norm", rms_norm, covers=_narrow),
        Counterpart("layer_norm", layer_norm, covers=_narrow),
        Counterpart("cross_entropy", cross_entropy),
        Counterpart(
            "linear_cross_entropy", linear_cross_entropy, covers=lambda sample: sample.options["reduction"] == "sum"
        ),
        Counterpart("linear_kl", linear_kl, covers=lambda sample: sample.options["divergence"] == "forward"),
        Counterpart("rotary", rotary, covers=lambda sample: "positions" not in sample.tensors, prepare=_tables_alike),
        Counterpart(
            "swiglu", lambda gate, up: activations.swiglu(gate, up), covers=lambda sample: "up" in sample.tensors
        ),
        Counterpart(
            "attention",
            attention,
            covers=lambda sample: sample.options.get("causal", True) and "softcap" not in sample.options,
            prepare=_batch_of_one,
        ),
    )


def _narrow(sample: Sample) -> bool:
    x = sample.tensors["x"]
    return x.shape[-1] * x.element_size() <= _ROW_BYTES


def _tables_alike(sample: Sample) -> Sample:
    """It refuses tables of another dtype than the heads'."""
    dense = contiguous(sample, "q", "k")
    tables = {name: dense.tensors[name].to(dense.tensors["q"].dtype) for name in ("cos", "sin")}
    return replace(dense, tensors={**dense.tensors, **tables})


def _batch_of_one(sample: Sample) -> Sample:
    """Packed sequences stand in a batch of one."""
    if "cu_seqlens" not in sample.tensors:
        return sample
    packed = {name: sample.tensors[name][None] for name in ("q", "k", "v")}
    starts = sample.tensors["cu_seqlens"].long()
    return replace(sample, tensors={**sample.tensors, **packed, "cu_seqlens": starts})
