"""Triton kernels for Transformers, each with its plain PyTorch reference; needs torch, and triton where there is a GPU.

    from tilewright.kernels import rms_norm
    y = rms_norm(x, weight)

Each op works in eager code, under autograd, ``torch.compile`` and activation checkpointing, on any device: the Triton
kernels serve CUDA tensors, the reference serves the rest. `choose` tells which one runs and why, `use` overrides it.
`patch`, `unpatch` and `register_attention` put them into models of ``transformers``, which is imported only then.
"""

from typing import TYPE_CHECKING, Any

from tilewright.kernels import nn
from tilewright.kernels.adamw import adamw
from tilewright.kernels.attention import attention
from tilewright.kernels.cross_entropy import cross_entropy
from tilewright.kernels.dispatch import Choice, choose, use
from tilewright.kernels.flash_attention import choose_attention
from tilewright.kernels.geglu import geglu
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy
from tilewright.kernels.linear_kl import linear_kl
from tilewright.kernels.linear_logprob import linear_logprob
from tilewright.kernels.optim import AdamW, clip_coefficient
from tilewright.kernels.qk_norm_rotary import qk_norm_rotary
from tilewright.kernels.relu2 import relu2
from tilewright.kernels.rms_norm import rms_norm
from tilewright.kernels.rotary import rotary
from tilewright.kernels.rotary_tables import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryScaling,
    YarnScaling,
    rotary_tables,
)
from tilewright.kernels.swiglu import swiglu

if TYPE_CHECKING:
    from tilewright.kernels.huggingface import patch as patch
    from tilewright.kernels.huggingface import register_attention as register_attention
    from tilewright.kernels.huggingface import unpatch as unpatch

__all__ = [
    "AdamW",
    "Choice",
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "RotaryScaling",
    "YarnScaling",
    "adamw",
    "attention",
    "choose",
    "choose_attention",
    "clip_coefficient",
    "cross_entropy",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
    "nn",
    "qk_norm_rotary",
    "relu2",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "swiglu",
    "use",
]


def __getattr__(name: str) -> Any:
    """The names that need transformers, left out of ``__all__`` so that a star import does not load it."""
    if name in ("patch", "register_attention", "unpatch"):
        try:
            from tilewright.kernels import huggingface
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            message = f"tilewright.kernels.{name} needs transformers: pip install 'tilewright[transformers]'"
            raise ImportError(message) from error
        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
