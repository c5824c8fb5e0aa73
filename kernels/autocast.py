"""What ``torch.autocast`` does to the inputs of an op, as it does to those of the op's counterpart in PyTorch.

Autocast sorts ops by what they can bear: matrix products and attention take the low precision, norms on CUDA are
raised to float32, elementwise ops are left alone. float64 is never touched.
"""

from __future__ import annotations

from typing import Any

import torch

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def lowers(device: str) -> bool:
    """Whether autocast is enabled for a type of device; devices that have none, such as meta, PyTorch does not ask."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def to_lower_precision(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is enabled for their device, else as they are: what PyTorch does for
    ``linear`` and ``scaled_dot_product_attention``. Differentiable; integers, float64 and None pass through."""
    if not torch._C._is_any_autocast_enabled():  # the usual case first, and quickly
        return tensors
    device = next((x.device.type for x in tensors if isinstance(x, torch.Tensor)), "cpu")
    if not lowers(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in _AUTOCAST else x for x in tensors)


def to_float32(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The 16-bit tensors in float32 where autocast is enabled on CUDA, else as they are: what PyTorch does for
    ``layer_norm`` and ``rms_norm``, which on CPU it leaves alone. Differentiable; others and None pass through."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(
        x.float() if isinstance(x, torch.Tensor) and x.is_cuda and x.dtype in _AUTOCAST else x for x in tensors
    )
