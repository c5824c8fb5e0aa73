"""NVIDIA apex's fused norms and Adam, where the real apex with its CUDA extensions is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tilewright.benchmarks.kernels.providers.missing import NotServed, on_cuda, without
from tilewright.trainer.record.environment import probe_apex

Tensor = torch.Tensor


def ready(device: torch.device) -> None:
    """Raise `NotServed` where it cannot run."""
    probe = probe_apex()
    if not probe.real:
        raise NotServed(f"NVIDIA apex: {probe.detail.split(';')[0]}")
    on_cuda("apex", device)


def _normalization() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")


def _rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    without("apex's fused_rms_norm", weight_offset=weight_offset, residual=residual)
    y: Tensor = _normalization().fused_rms_norm_affine(x, weight, x.shape[-1:], eps)
    return y


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    without("apex's fused_layer_norm", residual=residual)
    y: Tensor = _normalization().fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)
    return y


def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, stochastic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What FusedAdam calls, in place, unlike ours."""
    without("apex's FusedAdam", stochastic=stochastic)
    if exp_avg.dtype != torch.float32 or exp_avg_sq.dtype != torch.float32:
        raise NotServed("apex's FusedAdam keeps its state in float32")
    apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    overflow = torch.zeros(1, dtype=torch.int32, device=param.device)
    lists = [[grad], [param], [exp_avg], [exp_avg_sq]]
    decoupled, bias_correction = 1, 1
    kernel = importlib.import_module("amp_C").multi_tensor_adam
    apply(kernel, overflow, lists, lr, *betas, eps, step, decoupled, bias_correction, weight_decay)
    return param, exp_avg, exp_avg_sq


OPS: dict[str, Callable[..., Any]] = {"adamw": _adamw, "layer_norm": _layer_norm, "rms_norm": _rms_norm}
