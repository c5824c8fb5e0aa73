"""Liger-Kernel's counterparts of our ops, through its functional faces and with their defaults.

Left out, for want of a counterpart: layer_norm with a residual, gates and ups side by side (it copies them apart
first), rotary at given positions or interleaved, GEGLU by the error function, log-probabilities, attention, AdamW.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tilewright.benchmarks.audit.peers.counterpart import Counterpart, contiguous

MATMULS: dict[str, dict[str, int]] = {}
_BETA = {"forward": 0.0, "reverse": 1.0, "jensen-shannon": 0.5}


def counterparts() -> tuple[Counterpart, ...]:
    """Import Liger-Kernel and name its counterparts."""
    liger = importlib.import_module("liger_kernel.transformers.functional")

    def rms_norm(x: Any, weight: Any, residual: Any = None) -> Any:
        if residual is None:
            return liger.liger_rms_norm(x, weight, 1e-6)
        return liger.liger_fused_add_rms_norm(x, residual, weight, 1e-6)

    def cross_entropy(logits: Any, targets: Any, *, z_loss: float = 0.0, **options: Any) -> Any:
        return liger.liger_cross_entropy(logits, targets, lse_square_scale=z_loss, **options)

    def linear_cross_entropy(hidden: Any, weight: Any, targets: Any, *, reduction: str) -> Any:
        return liger.liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction)

    def linear_kl(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any, *, divergence: str) -> Any:
        return liger.liger_fused_linear_jsd(hidden, weight, teacher_hidden, teacher_weight, jsd_beta=_BETA[divergence])

    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> Any:
        heads_first = q.transpose(1, 2), k.transpose(1, 2)
        return liger.liger_rope(*heads_first, cos[None], sin[None], rotary_dim=2 * cos.shape[-1])

    return (
        Counterpart("rms_norm", rms_norm),
        Counterpart(
            "layer_norm",
            lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5),
            covers=lambda sample: "residual" not in sample.tensors,
        ),
        Counterpart("cross_entropy", cross_entropy),
        Counterpart("linear_cross_entropy", linear_cross_entropy),
        Counterpart("linear_kl", linear_kl),
        Counterpart(
            "rotary",
            rotary,
            covers=lambda sample: "positions" not in sample.tensors and not sample.options["interleaved"],
            prepare=lambda sample: contiguous(sample, "q", "k"),
        ),
        Counterpart(
            "swiglu", lambda gate, up: liger.liger_swiglu(gate, up), covers=lambda sample: "up" in sample.tensors
        ),
        Counterpart(
            "geglu",
            lambda gate, up, *, approximate: liger.liger_geglu(gate, up),
            covers=lambda sample: "up" in sample.tensors and sample.options.get("approximate") == "tanh",
        ),
        Counterpart("relu2", liger.liger_relu_squared, covers=lambda sample: sample.tensors["x"].is_contiguous()),
    )
