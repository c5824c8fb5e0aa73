"""Every op's `OpSpec`: the list that tests, audit and benchmarks walk. A new op is one new file plus its line here."""

from __future__ import annotations

from tilewright.kernels.adamw import SPEC as ADAMW
from tilewright.kernels.attention import SPEC as ATTENTION
from tilewright.kernels.cross_entropy import SPEC as CROSS_ENTROPY
from tilewright.kernels.geglu import SPEC as GEGLU
from tilewright.kernels.layer_norm import SPEC as LAYER_NORM
from tilewright.kernels.linear_cross_entropy import SPEC as LINEAR_CROSS_ENTROPY
from tilewright.kernels.linear_kl import SPEC as LINEAR_KL
from tilewright.kernels.linear_logprob import SPEC as LINEAR_LOGPROB
from tilewright.kernels.opspec import OpSpec
from tilewright.kernels.qk_norm_rotary import SPEC as QK_NORM_ROTARY
from tilewright.kernels.relu2 import SPEC as RELU2
from tilewright.kernels.rms_norm import SPEC as RMS_NORM
from tilewright.kernels.rotary import SPEC as ROTARY
from tilewright.kernels.swiglu import SPEC as SWIGLU

SPECS: tuple[OpSpec, ...] = (
    ADAMW,
    ATTENTION,
    CROSS_ENTROPY,
    GEGLU,
    LAYER_NORM,
    LINEAR_CROSS_ENTROPY,
    LINEAR_KL,
    LINEAR_LOGPROB,
    QK_NORM_ROTARY,
    RELU2,
    RMS_NORM,
    ROTARY,
    SWIGLU,
)
