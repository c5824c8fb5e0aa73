"""The ops as modules: drop-in counterparts of those of ``torch.nn``.

    from tilewright.kernels import nn
    norm = nn.RMSNorm(4096)                 # for torch.nn.RMSNorm(4096); either loads the other's state dict

| module | counterpart | adds |
|---|---|---|
| `RMSNorm` | ``torch.nn.RMSNorm`` | residual, weight_offset |
| `LayerNorm` | ``torch.nn.LayerNorm`` | residual |
| `CrossEntropyLoss` | ``torch.nn.CrossEntropyLoss`` | z_loss, softcap, group |
| `LinearCrossEntropyLoss` | ``torch.nn.LinearCrossEntropyLoss`` | z_loss, softcap, group |
| `Attention` | ``torch.nn.MultiheadAttention`` | kv_heads, window, softcap, sinks, rotary embedding, packed documents |
| `SwiGLU`, `GEGLU` | none; the keys are those of LLaMA and Gemma checkpoints | |

Arguments and defaults are the counterpart's, in its order; what is added is keyword-only. State-dict keys and initial
values are the counterpart's too. What a counterpart takes and the op does not compute is refused by name with a
``ValueError``, never ignored. Shapes, dtypes and numerics are the ops' own: see each op.
"""

from __future__ import annotations

from tilewright.kernels.nn.attention import Attention
from tilewright.kernels.nn.feed_forward import GEGLU, SwiGLU
from tilewright.kernels.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from tilewright.kernels.nn.norms import LayerNorm, RMSNorm

__all__ = ["GEGLU", "Attention", "CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "SwiGLU"]
