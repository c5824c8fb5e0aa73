"""An op and what can go wrong with its kernel, for the audit to catch: ``python broken_kernels.py NAME`` compiles one.

The op doubles the rows of a matrix of 1,000 columns; each program walks over its share of them.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from tilewright.kernels.launch import processors
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work

WIDTH = 1000


@triton.jit
def _double(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + columns, (2 * x).to(y_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _double_reading_twice(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        x += tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + columns, x.to(y_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _double_without_mask(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + columns).to(tl.float32)
        tl.store(y_ptr + row * width + columns, (2 * x).to(y_ptr.dtype.element_ty))


@triton.jit
def _double_of_huge_block(x_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        x -= tl.max(x)  # what was loaded must stay in registers until all of it is known
        tl.store(y_ptr + row * width + columns, (x / tl.sum(x)).to(y_ptr.dtype.element_ty), mask=columns < width)


KERNELS = {
    "double": (_double, 1024),
    "reading twice": (_double_reading_twice, 1024),
    "without mask": (_double_without_mask, 1024),
    "of huge block": (_double_of_huge_block, 65536),
}


def spec_of(name: str) -> OpSpec:
    """The op with one of the kernels."""
    kernel, block = KERNELS[name]

    def double(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        kernel[(processors(x.device),)](x, y, x.shape[0], x.shape[1], BLOCK=block, num_warps=4)
        return y

    def audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
        yield Sample("rows", {"x": torch.empty(32 if small else 4096, WIDTH, dtype=dtype)})

    def no_samples(*_: Any) -> Iterator[Sample]:
        return iter(())

    return OpSpec(
        name="double",
        function=double,
        reference=lambda x: 2 * x,
        samples=no_samples,
        audit_samples=audit_samples,
        work=lambda sample: Passes(Work(sample.tensors["x"].numel(), 2 * sample.nbytes("x"))),
        tables={},
        strided=(),
        no_gradient=frozenset({"x"}),
    )


def main() -> None:
    """Print what the compiler makes of one of the kernels on an H100, as the audit's own process does."""
    from tilewright.cli.clone import load_benchmarks

    load_benchmarks()
    from tilewright.benchmarks.audit import compiled
    from tilewright.kernels.ahead_of_time import launches_of

    spec = spec_of(sys.argv[1])
    launches = ((spec.name, label, launch) for label, launch in launches_of(spec, torch.bfloat16, 90))
    for kernel in compiled.distinct_kernels(launches):
        for finding in compiled.findings(kernel):
            print(json.dumps(finding), flush=True)


if __name__ == "__main__":
    main()
