"""Every op's `OpSpec`: the list that tests, audit and benchmarks walk. A new op is one new file plus its line here."""

from __future__ import annotations

from tilewright.kernels.attention import SPEC as ATTENTION
from tilewright.kernels.cross_entropy import SPEC as CROSS_ENTROPY
from tilewright.kernels.layer_norm import SPEC as LAYER_NORM
from tilewright.kernels.linear_cross_entropy import SPEC as LINEAR_CROSS_ENTROPY
from tilewright.kernels.opspec import OpSpec
from tilewright.kernels.rms_norm import SPEC as RMS_NORM
from tilewright.kernels.rotary import SPEC as ROTARY
from tilewright.kernels.swiglu import SPEC as SWIGLU

SPECS: tuple[OpSpec, ...] = (
    ATTENTION,
    CROSS_ENTROPY,
    LAYER_NORM,
    LINEAR_CROSS_ENTROPY,
    RMS_NORM,
    ROTARY,
    SWIGLU,
)
