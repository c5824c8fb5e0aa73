"""The gated linear unit with the swish gate (Shazeer 2020, arXiv:2002.05202): silu(gate) · up, elementwise.

    σ = 1 / (1 + exp(−gate))          y = gate · σ · up

Backward, for an upstream gradient g of y:

    dgate = g · up · σ · (1 + gate · (1 − σ))          dup = g · gate · σ

Shapes, dtypes, memory traffic and launch are those of every gated unit: see `gated`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.gated import (
    TABLE,
    audit_samples,
    check_gated,
    halves,
    register_gated,
    samples,
    work_of,
)
from tilewright.kernels.opspec import OpSpec

if HAS_TRITON:
    import triton
    import triton.language as tl


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up.

    Args:
        gate: (…, width); without `up`, (…, 2·width): gate and up side by side.
        up: of the shape and dtype of `gate`.

    Returns:
        (…, width), of the dtype of `gate`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_gated("swiglu", gate, up)
    if not runs_triton(gate):
        return reference(gate, up)
    y: torch.Tensor = _op(gate, up)
    return y


def reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch."""
    gate, up = halves(gate, up)
    # No upcast: silu rounds its result to the dtype before the product, as models in plain PyTorch do, and an eager
    # training step is spared float32 copies of its widest activations. Inductor makes it one pass in float32.
    return F.silu(gate) * up


if HAS_TRITON:

    @triton.jit
    def _silu(x):
        """silu(x) and its slope."""
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


_op = register_gated("swiglu", _silu if HAS_TRITON else None)

SPEC = OpSpec(
    name="swiglu",
    function=swiglu,
    reference=reference,
    samples=samples,
    audit_samples=audit_samples,
    # exp, a sum, a quotient and a product; two sums and two products.
    work=lambda sample: work_of(sample, activation=4, slope=4),
    strided=("gate", "up"),
    tables={"elementwise": TABLE},
)
