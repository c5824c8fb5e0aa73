"""liger-kernel's ops, by its functional interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tilewright.benchmarks.kernels.providers.missing import NotServed, installed, on_cuda, without

Tensor = torch.Tensor
_NAME = "liger-kernel"


def ready(device: torch.device) -> None:
    """Raise `NotServed` where it cannot run."""
    installed("liger_kernel", _NAME)
    on_cuda(_NAME, device)


def _functional() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def _rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Any:  # fmt: skip
    if residual is not None:
        return _functional().liger_fused_add_rms_norm(x, residual, weight, eps, weight_offset)
    return _functional().liger_rms_norm(x, weight, eps, weight_offset)


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    without(f"{_NAME}'s layer_norm", residual=residual)
    y: Tensor = _functional().liger_layer_norm(x, weight, bias, eps)
    return y


def _cross_entropy(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, **options: Any) -> Tensor:
    loss: Tensor = _functional().liger_cross_entropy(logits, targets, lse_square_scale=z_loss, **options)
    return loss


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, z_loss: float = 0.0, **options: Any
) -> Tensor:
    loss: Tensor = _functional().liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias, lse_square_scale=z_loss, **options
    )
    return loss


def _linear_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, divergence: str = "forward"
) -> Tensor:
    beta = {"forward": 0.0, "reverse": 1.0, "jensen-shannon": 0.5}[divergence]
    loss: Tensor = _functional().liger_fused_linear_jsd(
        hidden, weight, teacher_hidden, teacher_weight, jsd_beta=beta
    )  # fmt: skip
    return loss


def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    without(f"{_NAME}'s rope", positions=positions is not None, interleaved=interleaved)
    q, k = (x.transpose(1, 2) for x in (q, k))
    q, k = _functional().liger_rope(q, k, cos[None], sin[None], rotary_dim=2 * cos.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2)


def _swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    y: Tensor = _functional().liger_swiglu(gate, _separate("swiglu", up))
    return y


def _geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        raise NotServed(f"{_NAME}'s geglu is the tanh approximation alone")
    y: Tensor = _functional().liger_geglu(gate, _separate("geglu", up))
    return y


def _separate(op: str, up: Tensor | None) -> Tensor:
    if up is None:
        raise NotServed(f"{_NAME}'s {op} takes gate and up apart")
    return up


def _relu2(x: Tensor) -> Tensor:
    y: Tensor = _functional().liger_relu_squared(x)
    return y


OPS: dict[str, Callable[..., Any]] = {
    "cross_entropy": _cross_entropy,
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_kl": _linear_kl,
    "relu2": _relu2,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
}
