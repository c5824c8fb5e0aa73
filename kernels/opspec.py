"""`OpSpec`: what an op declares about itself, so that tests, audit and benchmarks are written once, over all ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tilewright.kernels.launch import LaunchTable


@dataclass(frozen=True)
class Sample:
    """One call of an op: its tensors by parameter name (an absent optional one is left out) and its other options.

    The tensors named in `float32` stay float32 where the others are tested in 16 bits, such as a norm's weight.
    """

    label: str
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    float32: frozenset[str] = frozenset()

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensor `name` takes where the sample is run in `dtype`."""
        return torch.promote_types(dtype, torch.float32) if name in self.float32 else dtype

    def nbytes(self, *names: str) -> int:
        """Bytes of the named tensors, of those that are there."""
        return sum(self.tensors[name].nbytes for name in names if name in self.tensors)


class Work(NamedTuple):
    """What a pass cannot do without: floating-point operations, and bytes of inputs read and outputs written once.

    Sums, products, quotients and functions such as exp count one each, a reduction as many as it takes in; comparisons
    and choices are no operations, and what is done once a row or once a block is left out.
    """

    flops: int
    bytes: int


class Passes(NamedTuple):
    """The work of an op's forward pass, of its backward pass, and what the two have in common.

    `common` is what both need and need not be done twice where a gradient is asked for: cross-entropy can read a row of
    logits once and write its gradient at once.
    """

    forward: Work
    backward: Work = Work(0, 0)
    common: Work = Work(0, 0)

    @property
    def both(self) -> Work:
        """Forward and backward together."""
        return Work(*(ahead + back - once for ahead, back, once in zip(*self, strict=True)))


@dataclass(frozen=True)
class OpSpec:
    """What an op promises.

    Attributes:
        name: the op's name under ``tilewright.kernels``.
        function: the public function, called as ``function(**tensors, **options)``.
        reference: the same in plain PyTorch, same signature; in float64 it is the exact answer.
        samples: small inputs that cover the options and the odd shapes, for a device and a dtype.
        audit_samples: inputs at the shapes of real models, for a dtype. Where `small` is False they are for the
            compiler: CPU memory that is never touched. Where it is True, the same launches as one processor sees them,
            for the interpreter: the same labels with fewer rows. A label that is absent there is compiled only.
        work: what the passes of one call cannot do without.
        matmuls: of an op whose operations are matrix products written in Triton, the number of them by kernel name
            ("_forward" among them); the products of one kernel are all of one size.
        tables: the launch tables by kernel name; every configuration in them is tested.
        strided: tensors that the kernels read in place, whatever the stride of their first dimension; the sample
            labelled "three rows", in which each has 3 entries there, is tested with the last past 2³¹ elements, and
            with more rows under dynamic shapes. The sample labelled "no rows" has none.
        tolerance: the error against float64 may be at most this many times that of the same-dtype reference.
        no_gradient: names of floating-point tensors that never take a gradient, such as rotary tables.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]]
    audit_samples: Callable[[torch.dtype, bool], Iterator[Sample]]
    work: Callable[[Sample], Passes]
    tables: dict[str, LaunchTable]
    strided: tuple[str, ...]
    tolerance: float = 2.0
    no_gradient: frozenset[str] = frozenset()
    matmuls: Mapping[str, int] = field(default_factory=dict)

    def differentiable(self, sample: Sample) -> list[str]:
        """The names of the sample's tensors that a gradient is asked for."""
        return [name for name, x in sample.tensors.items() if x.is_floating_point() and name not in self.no_gradient]
