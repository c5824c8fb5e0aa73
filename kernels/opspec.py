"""`OpSpec`: what an op declares about itself, so that tests, audit and benchmarks are written once, over all ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class OpSpec:
    """What an op promises.

    Attributes:
        name: the op's name under ``tilewright.kernels``.
        function: the public function, called as ``function(**tensors, **options)``.
        reference: the same in plain PyTorch, same signature; in float64 it is the exact answer.
        samples: small inputs that cover the options and the odd shapes, for a device and a dtype.
        audit_samples: inputs at the shapes of real models, for the compiler: CPU memory that is never touched.
        flops: floating-point operations that one forward call requires.
        compulsory_bytes: each input read once and each output written once, forward.
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
    audit_samples: Callable[[torch.dtype], Iterator[Sample]]
    flops: Callable[[Sample], int]
    compulsory_bytes: Callable[[Sample], int]
    tables: dict[str, LaunchTable]
    strided: tuple[str, ...]
    tolerance: float = 2.0
    no_gradient: frozenset[str] = frozenset()

    def differentiable(self, sample: Sample) -> list[str]:
        """The names of the sample's tensors that a gradient is asked for."""
        return [name for name, x in sample.tensors.items() if x.is_floating_point() and name not in self.no_gradient]
