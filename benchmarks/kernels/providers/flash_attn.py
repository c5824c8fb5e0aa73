"""flash-attn's attention, of whichever generation is installed: 2 or 3, by their public functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tilewright.benchmarks.kernels.providers.missing import NotServed, on_cuda
from tilewright.trainer.record.environment import probe_flash_attn

_MODULES = ("flash_attn_interface", "flash_attn")  # 3 before 2


def ready(device: torch.device) -> None:
    """Raise `NotServed` where it cannot run."""
    probe = probe_flash_attn()
    if not probe.real:
        raise NotServed(f"flash-attn: {probe.detail.split(';')[0]}")
    on_cuda("flash-attn", device)


def _module() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise NotServed("flash-attn 2 and 3 cannot be imported")


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None,
) -> torch.Tensor:  # fmt: skip
    if sinks is not None:
        raise NotServed("flash-attn has no sinks")
    module = _module()
    # How far a query looks to each side, its own key not counted, which ours counts.
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "softcap": softcap or 0.0}
    options["window_size"] = (left, 0 if causal and window is not None else left)
    if cu_seqlens is None:
        out: torch.Tensor = module.flash_attn_func(q, k, v, **options)
        return out
    packed: torch.Tensor = module.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
    )  # fmt: skip
    return packed


OPS: dict[str, Callable[..., Any]] = {"attention": _attention}
