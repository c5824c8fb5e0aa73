"""Triton's interpreter, made to count: integers are computed, floating-point numbers are blocks of one zero.

Nothing is read or written through a pointer to floating-point numbers. Where a kernel compares such numbers, they are
equal: what a pass does only where they are not (cross-entropy's backward pass, if another gradient came than it had
counted on) does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype, interpreter_builder

from tilewright.benchmarks.audit.issue import Counts, Issued, difference
from tilewright.benchmarks.audit.loops import turns


@contextmanager
def counting_builder(issued: Issued, every_turn: bool) -> Iterator[CountingBuilder]:
    """Make the interpreter's one builder, which every interpreted kernel refers to, count into `issued`."""
    interpreter_builder.__class__ = CountingBuilder
    interpreter_builder.issued = issued
    interpreter_builder.every_turn = every_turn
    try:
        yield interpreter_builder
    finally:
        interpreter_builder.__class__ = InterpreterBuilder


class CountingBuilder(InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's memory operations and arithmetic, counted, and skipped where they are of floats."""

    issued: Issued
    every_turn: bool
    grid: tuple[int, ...]
    programs: Sequence[int]
    starts: list[Counts]

    def run_programs(self, run: Callable[..., None], grid: tuple[int, ...], programs: Sequence[int]) -> set[Counts]:
        """Call `run` with the grid that has these programs of `grid` carried out; what the single ones issue.

        Programs have the numbers 0, 1, … in the order of the grid's last axis first.
        """
        self.grid, self.programs, self.starts = (*grid, 1, 1)[:3], programs, []
        if programs:
            run((len(programs), 1, 1))
        ends = [*self.starts, self.issued.counts][1:]
        return {difference(end, start) for start, end in zip(self.starts, ends, strict=True)}

    def set_grid_dim(self, *_: int) -> None:
        super().set_grid_dim(*self.grid)

    def set_grid_idx(self, index: int, *_: int) -> None:
        self.starts.append(self.issued.counts)
        ny, nz = self.grid[1:]
        program = self.programs[index]
        super().set_grid_idx(program // (ny * nz), program // nz % ny, program % nz)

    def turns(self, steps: Sequence[int], carried: tuple[str, ...]) -> Iterable[int]:
        """The turns of a loop that are to be run; `LoopRewriter` has kernels ask."""
        return steps if self.every_turn else turns(self.issued, steps, carried)

    def create_masked_load(self, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> TensorHandle:
        """Unmasked loads, and those through descriptors, come here too."""
        if self._moves_floats(pointers, mask):
            return _zeros(pointers.get_element_ty(), pointers.data.shape)
        return super().create_masked_load(pointers, mask, other, *rest, **named)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        if not self._moves_floats(pointers, mask):
            super().create_masked_store(pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> TensorHandle:
        if self._moves_floats(pointers, mask, times=2):
            return _zeros(value.dtype, value.data.shape)
        return super().create_atomic_rmw(operation, pointers, value, mask, *rest)

    def _moves_floats(self, pointers: Any, mask: Any, times: int = 1) -> bool:
        """Count the bytes of the lanes in `mask`, and say whether they are floats'."""
        kind = pointers.get_element_ty()
        self.issued.bytes += times * int(np.count_nonzero(mask.data)) * max(kind.primitive_bitwidth // 8, 1)
        self.issued.integer_accesses += not kind.is_floating()
        return bool(kind.is_floating())

    def create_addptr(self, pointers: Any, offset: Any) -> TensorHandle:
        if not pointers.get_element_ty().is_floating():
            return super().create_addptr(pointers, offset)
        first = pointers.data[(0,) * pointers.data.ndim]
        shape = np.broadcast_shapes(pointers.data.shape, offset.data.shape)
        return TensorHandle(np.broadcast_to(first, shape), pointers.dtype)

    def create_splat(self, kind: Any, scalar: Any) -> TensorHandle:
        return TensorHandle(np.broadcast_to(scalar.data.reshape(()), kind.shape), scalar.dtype.scalar)

    def create_dot(self, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
        self.issued.product_flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]
        return _zeros(d.dtype, d.data.shape)

    def unary_op(self, x: Any, operation: Any) -> TensorHandle:
        if not is_float(x):
            return super().unary_op(x, operation)
        self.issued.element_flops += x.data.size
        return x

    def binary_op(self, x: Any, y: Any, operation: Any) -> TensorHandle:
        if not (is_float(x) and is_float(y)):
            return super().binary_op(x, y, operation)
        result = _zeros(x.dtype, x.data.shape, y.data.shape)
        if operation in _COMPARISONS:
            result.data = np.broadcast_to(operation(0.0, 0.0), result.data.shape)
        else:
            self.issued.element_flops += result.data.size
        return result

    def ternary_op(self, x: Any, y: Any, z: Any, operation: Any) -> TensorHandle:
        if not is_float(z):
            return super().ternary_op(x, y, z, operation)
        if operation is not np.where:
            self.issued.element_flops += z.data.size
        return _zeros(z.dtype, x.data.shape, y.data.shape, z.data.shape)

    def create_fma(self, x: Any, y: Any, z: Any) -> TensorHandle:
        result = _zeros(z.dtype, x.data.shape, y.data.shape, z.data.shape)
        self.issued.element_flops += 2 * result.data.size
        return result

    def create_rsqrt(self, x: Any) -> TensorHandle:
        return self.unary_op(x, None)

    create_erf = create_fabs = create_rsqrt

    def cast_impl(self, x: Any, kind: Any) -> TensorHandle:
        if is_float(x) or kind.scalar.is_floating():
            return _zeros(kind.scalar, x.data.shape)
        return super().cast_impl(x, kind)

    def create_fp_to_fp(self, x: Any, kind: Any, _: Any) -> TensorHandle:
        return _zeros(kind.scalar, x.data.shape)


_COMPARISONS = frozenset({np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal})


def is_float(handle: TensorHandle) -> bool:
    """Whether a block holds floating-point numbers."""
    # Told by the data first: the interpreter labels a comparison of floats, which is a mask, as float. bfloat16 is
    # held as integers.
    if handle.data.dtype.kind == "f":
        return True
    is_pointer = hasattr(handle.dtype.scalar, "element_ty")
    return handle.data.dtype.kind != "b" and not is_pointer and bool(handle.dtype.scalar.is_floating())


def _zeros(dtype: Any, *shapes: tuple[int, ...]) -> TensorHandle:
    """A block of zeros that takes no memory, of the shape that `shapes` broadcast to."""
    block = np.broadcast_to(np.zeros((), _get_np_dtype(dtype)), np.broadcast_shapes(*shapes))
    return TensorHandle(block, dtype.scalar)


def reduction(issued: Issued, original: Callable[..., Any]) -> Callable[..., Any]:
    """``ReduceOps.apply_impl``: a reduction of floats is zeros of the shape that is left."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        if not all(is_float(x.handle) for x in inputs):
            return original(self, inputs)
        issued.element_flops += sum(x.handle.data.size for x in inputs)
        sizes = list(enumerate(inputs[0].handle.data.shape))
        reduced = {axis for axis, _ in sizes if self.axis is None or axis == self.axis % len(sizes)}
        left = [1 if axis in reduced else size for axis, size in sizes if self.keep_dims or axis not in reduced]
        return [self.to_tensor(np.zeros(left), x.dtype) for x in inputs]

    return apply_impl


def scan(issued: Issued, original: Callable[..., Any]) -> Callable[..., Any]:
    """``ScanOps.apply_impl``: a scan of floats is zeros of the same shape."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        if not all(is_float(x.handle) for x in inputs):
            return original(self, inputs)
        issued.element_flops += sum(x.handle.data.size for x in inputs)
        return [self.to_tensor(np.zeros(x.handle.data.shape), x.dtype) for x in inputs]

    return apply_impl
