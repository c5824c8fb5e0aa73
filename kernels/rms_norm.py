"""Root-mean-square normalisation along the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    rstd = 1 / sqrt(mean(x²) + eps)          y = x · rstd · (weight_offset + weight)

With a `residual` the sum s = x + residual is normalised instead and returned beside y, in one pass.

Backward, for an upstream gradient g of y, with x̂ = x · rstd and v = g · (weight_offset + weight):

    dx = rstd · (v − x̂ · mean(v · x̂))       dweight = Σ_rows g · x̂

A gradient of s is added to dx, which then is the gradient of both x and residual.

Shapes: x (…, width), any strides; weight (width,). Dtypes: float32, float16, bfloat16 (float64 in the reference). All
arithmetic is float32; dweight is summed in float32, first per program over its rows, then over the programs in a fixed
order, so that two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tilewright.kernels.autocast import to_float32
from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors, is_number
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import residual_streams
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import (
    BACKWARD_CANDIDATES,
    FLOAT32_COLUMNS,
    FORWARD_CANDIDATES,
    accumulation_dtype,
    as_rows,
    can_carry,
    divide,
    row_stride,
    sum_over_programs,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from tilewright.kernels.rows import load_block, load_parts, load_sum, store_block, store_part


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Divide each row of `x` by its root mean square and scale it by `weight`.

    Args:
        x: (…, width).
        weight: (width,), of the dtype of `x` or float32; None scales by 1.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 gives Gemma's 1 + w.
        residual: of the shape and dtype of `x`; x + residual is then normalised and returned as well.

    Returns:
        y like `x`, or with a residual (y, x + residual).

    Raises:
        ValueError: a shape, dtype or device does not fit, or a number is out of its range; the message names the
            argument.
    """
    x, weight, residual = to_float32(x, weight, residual)
    if not isinstance(x, torch.Tensor):
        check_tensors("rms_norm", x=x)
    check_float("rms_norm", x=x, weight=weight, residual=residual)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"rms_norm: x has shape {tuple(shape)}; it must be (…, width) with a width of at least 1")
    if not (is_number(eps) and eps >= 0):
        raise ValueError(f"rms_norm: eps is {eps!r}; it must be at least 0 and below 2⁶³")
    if not is_number(weight_offset):
        raise ValueError(
            f"rms_norm: weight_offset is {weight_offset!r}; it must be a number, finite and below 2⁶³ in size"
        )
    if weight is not None:
        check_shape("rms_norm", "weight", weight, shape[-1:], "the last dimension of x")
        check_same("rms_norm", "x", x, dtype=weight.dtype != torch.float32, weight=weight)
    if residual is not None:
        check_shape("rms_norm", "residual", residual, shape, "the shape of x")
        check_same("rms_norm", "x", x, residual=residual)
    if not runs_triton(x):
        return reference(x, weight, eps=eps, weight_offset=weight_offset, residual=residual)
    y, summed, _ = _forward_op(x, weight, residual, eps, weight_offset)
    return y if residual is None else (y, summed)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    summed = x if residual is None else x + residual
    wide = summed.to(accumulation_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, summed)


# A row up to BLOCK_COLUMNS wide is read once. A wider one is read twice, a block of columns to a program.
_FORWARD = LaunchTable(
    "rms_norm forward",
    {
        80: (
            Configuration(8192, 32, {"BLOCK_COLUMNS": 8192, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=3),
            Configuration(16384, 16, {"BLOCK_COLUMNS": 16384, "BLOCK_ELEMENTS": 16384, "PROGRAMS": 1}, num_stages=2),
            Configuration(1 << 31, 16, {"BLOCK_COLUMNS": 8192, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=3),
        )
    },
    FORWARD_CANDIDATES,
)
_BACKWARD = LaunchTable(
    "rms_norm backward",
    {
        80: (
            Configuration(4096, 16, {"BLOCK_COLUMNS": 4096, "BLOCK_ELEMENTS": 4096, "PROGRAMS": 1}, num_stages=3),
            Configuration(8192, 32, {"BLOCK_COLUMNS": 8192, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=2),
            Configuration(16384, 32, {"BLOCK_COLUMNS": 16384, "BLOCK_ELEMENTS": 16384, "PROGRAMS": 1}, num_stages=2),
            Configuration(1 << 31, 16, {"BLOCK_COLUMNS": 4096, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=2),
        )
    },
    BACKWARD_CANDIDATES,
)


if HAS_TRITON:

    @triton.jit(do_not_specialize=["rows"])
    def _squares(
        x_ptr,
        residual_ptr,
        summed_ptr,
        squares_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """The parts of each row's sum of squares, and x + residual."""
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            # int64: rows × stride may pass 2³¹
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_sum(
                x_ptr,
                residual_ptr,
                summed_ptr,
                row * x_stride + start,
                row * residual_stride + start,
                row * width + start,
                columns,
                mask,
            )
            store_part(squares_ptr, row, in_rows, tl.sum(x * x, axis=1))

    @triton.jit(do_not_specialize=["rows"])
    def _forward(
        x_ptr,
        weight_ptr,
        residual_ptr,
        squares_ptr,
        y_ptr,
        summed_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        eps,
        weight_offset,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:  # read once a program
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_sum(
                x_ptr,
                residual_ptr,
                summed_ptr,
                row * x_stride + start,
                row * residual_stride + start,
                row * width + start,
                columns,
                mask,
            )
            if squares_ptr is None:  # the block holds the whole row
                squares = tl.sum(x * x, axis=1)  # [BLOCK_ROWS]
            else:
                squares = tl.sum(load_parts(squares_ptr, row, in_rows, PARTS), axis=1)
            rstd = tl.rsqrt(squares / width + eps)
            y = x * rstd[:, None]
            if weight_ptr is not None:
                y = y * scale[None, :]
            store_block(y_ptr, row * width + start, columns, y, mask)
            tl.store(rstd_ptr + row, rstd, mask=row < tl.where(start == 0, rows, 0))

    @triton.jit(do_not_specialize=["rows"])
    def _projections(
        dy_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        projections_ptr,
        dy_stride,
        x_stride,
        rows,
        width,
        weight_offset,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """The parts of each row's Σ v · x̂."""
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_block(x_ptr, row * x_stride + start, columns, mask)
            v = load_block(dy_ptr, row * dy_stride + start, columns, mask)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            if weight_ptr is not None:
                v = v * scale[None, :]
            store_part(projections_ptr, row, in_rows, tl.sum(v * x * rstd[:, None], axis=1))

    @triton.jit(do_not_specialize=["rows"])
    def _backward(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        projections_ptr,
        dx_ptr,
        dweight_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        sums_stride,
        rows,
        width,
        weight_offset,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
            dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_block(x_ptr, row * x_stride + start, columns, mask)
            v = load_block(dy_ptr, row * dy_stride + start, columns, mask)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            normed = x * rstd[:, None]
            if weight_ptr is not None:
                dweight += v * normed
                v = v * scale[None, :]
            if projections_ptr is None:  # the block holds the whole row
                projection = tl.sum(v * normed, axis=1)  # [BLOCK_ROWS]
            else:
                projection = tl.sum(load_parts(projections_ptr, row, in_rows, PARTS), axis=1)
            dx = rstd[:, None] * (v - normed * (projection / width)[:, None])
            if dsummed_ptr is not None:
                dx += load_block(dsummed_ptr, row * dsummed_stride + start, columns, mask)
            store_block(dx_ptr, row * width + start, columns, dx, mask)
        if weight_ptr is not None:
            sums = tl.program_id(0).to(tl.int64) * sums_stride + start
            tl.store(dweight_ptr + sums + columns, tl.sum(dweight, axis=0), mask=start + columns < sums_stride)

    @triton.jit(do_not_specialize=["rows"])
    def _backward_carried(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        dx_ptr,
        dweight_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        sums_stride,
        rows,
        width,
        weight_offset,
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """`_backward` for whole rows that are held in 16 bits, each from the turn that sums it to the next."""
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = columns < width
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
            dweight = tl.zeros([BLOCK_COLUMNS], tl.float32)
        x = tl.zeros([BLOCK_COLUMNS], x_ptr.dtype.element_ty)
        dy = tl.zeros([BLOCK_COLUMNS], dy_ptr.dtype.element_ty)
        rstd, pull = 0.0, 0.0
        step = tl.num_programs(0)
        # One turn more than rows: nothing is written in the first and nothing loaded in the last.
        for turn in tl.range(tl.program_id(0), rows + step, step, num_stages=STAGES):
            row = tl.cast(turn, tl.int64)
            summed_row = row - step
            mask = in_width & (summed_row >= 0)
            v = dy.to(tl.float32)
            if weight_ptr is not None:
                v = v * scale
            dx = rstd * (v - x.to(tl.float32) * pull)
            if dsummed_ptr is not None:
                dsummed = tl.load(dsummed_ptr + summed_row * dsummed_stride + columns, mask=mask, other=0.0)
                dx += dsummed.to(tl.float32)
            tl.store(dx_ptr + summed_row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            mask = in_width & (row < rows)
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            product = dy.to(tl.float32) * (x.to(tl.float32) * rstd)
            if weight_ptr is not None:
                dweight += product
                product = product * scale
            pull = rstd * tl.sum(product, axis=0) / width
        if weight_ptr is not None:
            sums = tl.program_id(0).to(tl.int64) * sums_stride
            tl.store(dweight_ptr + sums + columns, dweight, mask=columns < sums_stride)


def _launch_forward(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(y) if residual is not None else x.new_empty(0)
    width = x.shape[-1]
    rows = x.numel() // width
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return y, summed, rstd
    x_rows = as_rows(x)
    residual_rows = as_rows(residual) if residual is not None else None
    weight = weight.contiguous() if weight is not None else None
    division = divide(rows, width, _FORWARD, x.device)
    squares = None
    if division.column_blocks > 1:
        squares = division.parts(rows, x.device)
        _squares[division.grid](
            x_rows, residual_rows, summed, squares,
            x_rows.stride(0), row_stride(residual_rows), rows, width, **division.options,
        )  # fmt: skip
        if residual is not None:
            x_rows, residual_rows = summed.view(rows, width), None
    _forward[division.grid](
        x_rows, weight, residual_rows, squares, y, summed, rstd,
        x_rows.stride(0), row_stride(residual_rows), rows, width, eps, weight_offset,
        PARTS=division.padded_parts, **division.options,
    )  # fmt: skip
    return y, summed, rstd


def _launch_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = rstd.numel()
    if rows == 0:
        return dx, torch.zeros_like(weight) if weight is not None else x.new_empty(0)
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dsummed_rows = as_rows(dsummed) if dsummed is not None else None
    weight = weight.contiguous() if weight is not None else None
    division = divide(rows, width, _BACKWARD, x.device, None if can_carry(x) else FLOAT32_COLUMNS)
    dweight = division.sums(x.device) if weight is not None else None
    strides = dy_rows.stride(0), row_stride(dsummed_rows), x_rows.stride(0), division.sums_stride
    if division.carried:
        _backward_carried[division.grid](
            dy_rows, dsummed_rows, x_rows, weight, rstd, dx, dweight, *strides, rows, width, weight_offset,
            **division.carried_options,
        )  # fmt: skip
    else:
        projections = None
        if division.column_blocks > 1:
            projections = division.parts(rows, x.device)
            _projections[division.grid](
                dy_rows, x_rows, weight, rstd, projections,
                dy_rows.stride(0), x_rows.stride(0), rows, width, weight_offset, **division.options,
            )  # fmt: skip
        _backward[division.grid](
            dy_rows, dsummed_rows, x_rows, weight, rstd, projections, dx, dweight, *strides,
            rows, width, weight_offset, PARTS=division.padded_parts, **division.options,
        )  # fmt: skip
    return dx, sum_over_programs(dweight, weight) if weight is not None else x.new_empty(0)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape)
    summed = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    return y, summed, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _fake_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape) if weight is not None else x.new_empty(0)


_forward_op = register(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, Tensor rstd, float weight_offset)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, residual, _, weight_offset = inputs
    _, summed, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.weight_offset = weight_offset
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, rstd)


def _gradients(ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    dsummed = dsummed if ctx.has_residual else None
    if dy is None:  # only the sum was used
        return dsummed, None, dsummed, None, None
    dx, dweight = _backward_op(dy, dsummed, x, weight, rstd, ctx.weight_offset)
    return dx, dweight if weight is not None else None, dx if ctx.has_residual else None, None, None


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


_FLOAT32 = frozenset({"weight"})


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def weighted(x: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x, "weight": normal(x.shape[-1]), **others}

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (127, 7)):
        yield Sample(f"{rows}x{width}", weighted(normal(rows, width)))
    for shape in ((3, 5, 64), (2, 4112)):
        yield Sample(f"no weight, width {shape[-1]}", {"x": normal(*shape)})
        options = {"weight_offset": 1.0, "eps": 1e-5}
        yield Sample(f"weight offset, float32 weight, width {shape[-1]}", weighted(normal(*shape)), options, _FLOAT32)
    for shape in ((2, 3, 96), (2, 1, 8193), (2, 16400)):
        yield Sample(f"residual, width {shape[-1]}", weighted(normal(*shape), residual=normal(*shape)))
    for rows, width in ((9, 8208), (3, 16384)):  # rows that the backward pass carries where they are in 16 bits
        yield Sample(f"carried, width {width}", weighted(normal(rows, width)))
    yield Sample("carried, residual", weighted(normal(5, 8208), residual=normal(5, 8208)))
    yield Sample("carried, no weight", {"x": normal(5, 8208)})
    yield Sample("residual, no weight", {"x": normal(5, 48), "residual": normal(5, 48)})
    yield Sample("three rows", weighted(normal(3, 40), residual=normal(3, 40)))
    yield Sample("no rows", weighted(normal(0, 40), residual=normal(0, 40)))
    yield Sample("transposed", weighted(normal(32, 6).t()))
    yield Sample("row stride", {"x": normal(9, 80)[:, :48], "weight": normal(96)[::2]})
    yield Sample("expanded", weighted(normal(1, 48).expand(9, 48)))


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    for label, x in residual_streams(dtype, small):
        tensors = {"x": x, "weight": x.new_empty(x.shape[-1])}
        yield Sample(label, tensors)
        yield Sample(f"{label}, residual", {**tensors, "residual": torch.empty_like(x)})


def _work(sample: Sample) -> Passes:
    """Forward: the input and what is added in, the norm and the sum out. Backward: the upstream gradients and the row
    that was normalised in, its gradient out; the parameters read, and their gradients written.

    For each element: its square, the sum and the scale; backward the scale, the sum of products, the difference of two
    products and its scale. The weight is a product, backward one and the two of its own gradient. What is added in is
    a sum, backward too."""
    x = sample.tensors["x"]
    weighted, added = "weight" in sample.tensors, "residual" in sample.tensors
    parameters = sample.nbytes("weight")
    row = sample.nbytes("x", "residual")
    return Passes(
        Work((3 + weighted + added) * x.numel(), 2 * row + parameters),
        Work((6 + 3 * weighted + added) * x.numel(), row + 2 * x.nbytes + sample.nbytes("weight") + parameters),
    )


SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("x", "residual"),
    tables={"forward": _FORWARD, "backward": _BACKWARD},
)
