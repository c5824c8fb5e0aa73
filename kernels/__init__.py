"""Triton kernels for Transformers, each with its plain PyTorch reference; needs torch, and triton where there is a GPU.

    from tilewright.kernels import rms_norm
    y = rms_norm(x, weight)

Each op works in eager code, under autograd, ``torch.compile`` and activation checkpointing, on any device: the Triton
kernels serve CUDA tensors, the reference serves the rest. `choose` tells which one runs and why, `use` overrides it.
"""

from tilewright.kernels.attention import attention
from tilewright.kernels.cross_entropy import cross_entropy
from tilewright.kernels.dispatch import Choice, choose, use
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy
from tilewright.kernels.rms_norm import rms_norm
from tilewright.kernels.rotary import rotary, rotary_tables
from tilewright.kernels.swiglu import swiglu

__all__ = [
    "Choice",
    "attention",
    "choose",
    "cross_entropy",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "swiglu",
    "use",
]
