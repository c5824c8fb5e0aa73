"""The error of an op against float64, beside that of the same computation in plain PyTorch of the same dtype.

Written once, over all `OpSpec`s: the tests hold ops to it, and the documentation shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.kernels.opspec import OpSpec, Sample


@dataclass(frozen=True)
class Run:
    """One forward and backward pass: outputs, their upstream gradients, and the gradient of each tensor by name."""

    outputs: list[torch.Tensor]
    upstream: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def outputs_of(result: Any) -> list[torch.Tensor]:
    """What an op returned, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def run(
    function: Callable[..., Any],
    spec: OpSpec,
    sample: Sample,
    dtype: torch.dtype,
    upstream: list[torch.Tensor] | None = None,
) -> Run:
    """`function`, forward and backward, on the sample in `dtype`; upstream gradients are drawn where none are given."""
    names = spec.differentiable(sample)
    tensors: dict[str, torch.Tensor] = {}
    for name, x in sample.tensors.items():
        # detach() keeps the strides; a change of dtype keeps the values.
        tensors[name] = x.detach().to(sample.dtype_of(name, dtype)) if x.is_floating_point() else x
        if name in names:
            tensors[name].requires_grad_()
    results = outputs_of(function(**tensors, **sample.options))
    if upstream is None:
        upstream = [torch.randn(r.shape, device=r.device).to(r.dtype) for r in results]
    upstream = [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
    if not names:
        return Run(results, upstream, {})
    # An output without a gradient, such as a part of the loss that is returned to be logged, takes none from upstream.
    asked = [(r, g) for r, g in zip(results, upstream, strict=True) if r.requires_grad]
    gradients = torch.autograd.grad([r for r, _ in asked], [tensors[name] for name in names], [g for _, g in asked])
    return Run([r.detach() for r in results], upstream, dict(zip(names, gradients, strict=True)))


@dataclass(frozen=True)
class Comparison:
    """One output or gradient three times: from the op, from PyTorch in the same dtype, and in float64.

    `magnitude` is the largest number among what is compared together (all outputs, or all gradients): a gradient that
    cancels to zero is a sum of terms of about that size.
    """

    what: str
    ours: torch.Tensor
    same: torch.Tensor
    exact: torch.Tensor
    magnitude: float

    @property
    def error(self) -> float:
        """The op's largest absolute error against float64, where the exact value is finite."""
        return self._error_of(self.ours)

    @property
    def reference_error(self) -> float:
        """PyTorch's."""
        return self._error_of(self.same)

    def allowed(self, tolerance: float) -> float:
        """The largest error that the contract accepts: `tolerance` times PyTorch's.

        PyTorch may be exact by luck on a few elements. A difference of two rounded numbers (in attention's backward
        pass, of one token with itself) is off by up to two units in the last place of the larger; that is no fault.
        """
        return tolerance * self.reference_error + 2 * torch.finfo(self.ours.dtype).eps * self.magnitude

    def _error_of(self, x: torch.Tensor) -> float:
        return largest([(x.double() - self.exact)[self.exact.isfinite()]])


def compare(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> Iterator[Comparison]:
    """Every output and every gradient of the sample in `dtype`, computed three times from the same inputs."""
    drawn = run(spec.reference, spec, sample, torch.float64).upstream
    upstream = [g.to(dtype) for g in drawn]
    exact = run(spec.reference, spec, sample, torch.float64, upstream)
    same = run(spec.reference, spec, sample, dtype, upstream)
    ours = run(spec.function, spec, sample, dtype, upstream)
    magnitude = largest(exact.outputs)
    for number, triple in enumerate(zip(ours.outputs, same.outputs, exact.outputs, strict=True)):
        yield Comparison(f"output {number}", *triple, magnitude)
    magnitude = largest(list(exact.gradients.values()))
    for name, gradient in ours.gradients.items():
        yield Comparison(
            f"gradient of {name}", gradient, same.gradients[name], exact.gradients[name], magnitude
        )  # fmt: skip


def largest(tensors: list[torch.Tensor]) -> float:
    """The largest finite absolute value in `tensors`; 0 where there is none."""
    finite = [x[x.isfinite()].abs() for x in tensors]
    return max((x.max().item() for x in finite if x.numel()), default=0.0)
