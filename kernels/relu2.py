"""The squared rectifier relu(x)² (So et al. 2021, Primer, arXiv:2109.08668), elementwise.

    y = max(x, 0)²

Backward, for an upstream gradient g of y:

    dx = 2 · g · max(x, 0)

Nothing is saved but x. Each pass reads each of its inputs once and writes its result once; in plain PyTorch forward and
backward are two passes each.

Shapes: any. Contiguous tensors are read as one row, so that loads stay aligned whatever the width; others as rows,
wherever they stand, with a copy only where the elements of a row are not adjacent. Dtypes: float32, float16, bfloat16
(float64 in the reference). All arithmetic is float32. NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_tensors
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import MODELS, batches
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x)².

    Args:
        x: of any shape.

    Returns:
        Like `x`.

    Raises:
        ValueError: x is of no floating dtype that the op takes.
    """
    check_tensors("relu2", x=x)
    check_float("relu2", x=x)
    if not runs_triton(x):
        return reference(x)
    y: torch.Tensor = _forward_op(x)
    return y


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    return F.relu(x).square()


# Elementwise: 16 elements a thread are enough loads in flight, and every program is short.
_TABLE = LaunchTable(
    "relu2 elementwise",
    {
        80: (
            Configuration(128, 4, {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}),
            Configuration(512, 4, {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}),
            Configuration(1 << 62, 4, {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 2048}),
        )
    },
    tuple(
        Configuration(1 << 62, warps, {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns})
        for rows, columns, warps in ((1, 1024, 4), (1, 2048, 8), (1, 4096, 8))
    ),
)


if HAS_TRITON:

    @triton.jit
    def _forward(x_ptr, y_ptr, x_stride, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
        column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
        # int64: rows × stride, and one row alone, may pass 2³¹
        row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        column = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (column < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        positive = tl.where(x < 0.0, 0.0, x)  # not tl.maximum, which would turn NaN into 0
        tl.store(y_ptr + row * width + column, (positive * positive).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward(
        dy_ptr,
        x_ptr,
        dx_ptr,
        dy_stride,
        x_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
        row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        column = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (column < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        dx = 2.0 * dy * tl.where(x < 0.0, 0.0, x)
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _rows_and_blocks(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int], dict[str, int]]:
    """The tensors, of one shape, as rows, with the grid and the constexprs of a pass over them."""
    if all(x.is_contiguous() for x in tensors):
        views = [x.view(1, -1) for x in tensors]
    else:
        views = [as_rows(x) for x in tensors]
    rows, width = views[0].shape
    configuration = _TABLE.pick(width, tensors[0].device)
    blocks = configuration.blocks
    # One axis: a grid's second stops at 65,535 programs.
    programs = triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(width, blocks["BLOCK_COLUMNS"])
    return views, (programs,), {**blocks, "num_warps": configuration.num_warps}


def _launch_forward(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        (x_rows,), grid, constants = _rows_and_blocks(x)
        _forward[grid](x_rows, y, x_rows.stride(0), *x_rows.shape, **constants)
    return y


def _launch_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        (dy_rows, x_rows), grid, constants = _rows_and_blocks(dy, x)
        _backward[grid](dy_rows, x_rows, dx, dy_rows.stride(0), x_rows.stride(0), *x_rows.shape, **constants)
    return dx


def _fake_forward(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


_forward_op = register("relu2(Tensor x) -> Tensor", _launch_forward, _fake_forward)
_backward_op = register("relu2_backward(Tensor dy, Tensor x) -> Tensor", _launch_backward, _fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    dx: torch.Tensor = _backward_op(dy, x)
    return dx


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for shape in ((1, 1), (7, 127), (2, 3, 1000), (2, 4097), (96,), ()):
        yield Sample("x".join(map(str, shape)) or "no dimension", {"x": normal(*shape)})
    yield Sample("large", {"x": 40 * normal(3, 64)})
    yield Sample("three rows", {"x": normal(3, 40)})
    yield Sample("no rows", {"x": normal(0, 40)})
    yield Sample("transposed", {"x": normal(300, 9).t()})
    for width in (100, 300, 4097):
        yield Sample(f"row stride, width {width}", {"x": normal(3, width + 7)[:, :width]})
    yield Sample("expanded", {"x": normal(1, 300).expand(9, 300)})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    for model in MODELS:
        for length_name, sequences, length in batches(small):
            wide = torch.empty(sequences * length, model.hidden + 16, dtype=dtype)
            x = wide.new_empty(sequences * length, model.hidden)
            yield Sample(f"{model.name} {length_name}", {"x": x})
            yield Sample(f"{model.name} {length_name}, row stride", {"x": wide[:, : model.hidden]})


SPEC = OpSpec(
    name="relu2",
    function=relu2,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=lambda sample: Passes(
        Work(sample.tensors["x"].numel(), 2 * sample.nbytes("x")),
        Work(2 * sample.tensors["x"].numel(), 3 * sample.nbytes("x")),
    ),
    strided=("x",),
    tables={"elementwise": _TABLE},
)
