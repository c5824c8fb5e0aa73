"""The gated linear unit with the GELU gate (Shazeer 2020, arXiv:2002.05202): gelu(gate) · up, elementwise.

With Φ and φ the distribution function and the density of the standard normal distribution (Hendrycks and Gimpel 2016,
arXiv:1606.08415):

    Φ = (1 + erf(gate / √2)) / 2          φ = exp(−gate² / 2) / √(2π)          y = gate · Φ · up

Backward, for an upstream gradient g of y:

    dgate = g · up · (Φ + gate · φ)          dup = g · gate · Φ

``approximate="tanh"`` takes Φ ≈ (1 + tanh u) / 2 = 1 / (1 + exp(−2u)) with u = √(2/π) · (gate + 0.044715 · gate³), and
then, for the slope, gate · φ ≈ gate · Φ · (1 − Φ) · 2u′ with u′ = √(2/π) · (1 + 3 · 0.044715 · gate²). Written with the
exponential, it loses nothing to cancellation where Φ is nearly 0 or 1.

Shapes, dtypes, memory traffic and launch are those of every gated unit: see `gated`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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
from tilewright.kernels.opspec import OpSpec, Passes, Sample

if HAS_TRITON:
    import triton
    import triton.language as tl


def geglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """gelu(gate) · up.

    Args:
        gate: (…, width); without `up`, (…, 2·width): gate and up side by side.
        up: of the shape and dtype of `gate`.
        approximate: ``"none"``, or ``"tanh"`` for GELU's approximation by it, as in ``torch.nn.functional.gelu``.

    Returns:
        (…, width), of the dtype of `gate`.

    Raises:
        ValueError: a shape, dtype, device or `approximate` does not fit; the message names the argument.
    """
    check_gated("geglu", gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}; it must be 'none' or 'tanh'")
    if not runs_triton(gate):
        return reference(gate, up, approximate=approximate)
    y: torch.Tensor = _tanh_op(gate, up) if approximate == "tanh" else _op(gate, up)
    return y


def reference(gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """The same in plain PyTorch, without an upcast, as in `swiglu`."""
    gate, up = halves(gate, up)
    return F.gelu(gate, approximate=approximate) * up


if HAS_TRITON:

    @triton.jit
    def _gelu(x):
        """gelu(x) and its slope."""
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / √2
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / √(2π)
        return x * cdf, cdf + x * density

    @triton.jit
    def _gelu_tanh(x):
        """gelu(x), approximated with tanh, and its slope."""
        # 2u and its slope: 1.5957691216057308 = 2 √(2/π)
        twice_u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        # Φ and Φ · (1 − Φ) from an exponential that is at most 1, so that neither tail overflows or cancels.
        small = tl.exp(-tl.abs(twice_u))
        larger = 1.0 / (1.0 + small)
        cdf = tl.where(twice_u < 0.0, small * larger, larger)
        return x * cdf, cdf + x * small * larger * larger * slope


_op = register_gated("geglu", _gelu if HAS_TRITON else None)
_tanh_op = register_gated("geglu_tanh", _gelu_tanh if HAS_TRITON else None)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for sample in samples(device, dtype):
        yield sample
        yield dataclasses.replace(sample, label=f"{sample.label}, tanh", options={"approximate": "tanh"})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    for sample in audit_samples(dtype, small):
        yield sample
        yield dataclasses.replace(sample, label=f"{sample.label}, tanh", options={"approximate": "tanh"})


def _work(sample: Sample) -> Passes:
    """With the error function: it, its argument and result scaled, a sum and the product; the slope's density (three
    products and exp), a product and a sum. With tanh: five operations for its argument, exp, a sum, a quotient and the
    product; three for the argument's slope, a difference, three products and a sum."""
    tanh = sample.options.get("approximate") == "tanh"
    return work_of(sample, activation=9, slope=8) if tanh else work_of(sample, activation=5, slope=6)


SPEC = OpSpec(
    name="geglu",
    function=geglu,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("gate", "up"),
    tables={"elementwise": TABLE},
)
