"""Layer normalisation along the last dimension (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

    mean = mean(x)          rstd = 1 / sqrt(mean((x − mean)²) + eps)          y = (x − mean) · rstd · weight + bias

With a `residual` the sum s = x + residual is normalised instead and returned beside y, in one pass.

Backward, for an upstream gradient g of y, with x̂ = (x − mean) · rstd and v = g · weight:

    dx = rstd · (v − mean(v) − x̂ · mean(v · x̂))       dweight = Σ_rows g · x̂       dbias = Σ_rows g

A gradient of s is added to dx, which then is the gradient of both x and residual.

Shapes: x (…, width), any strides; weight and bias (width,). Dtypes: float32, float16, bfloat16 (float64 in the
reference). All arithmetic is float32. The variance is the mean of squared deviations from a mean computed before,
never E[x²] − E[x]², which loses every digit where the mean is large against the deviations. A row too wide for
registers is cut into blocks, each with a mean of its own, combined by the rule of Chan, Golub and LeVeque (1979).
dweight and dbias are summed in float32, first per program over its rows, then over the programs in a fixed order, so
that two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

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


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Bring each row of `x` to mean 0 and variance 1, then scale it by `weight` and shift it by `bias`.

    Args:
        x: (…, width).
        weight: (width,), of the dtype of `x` or float32; None scales by 1.
        bias: (width,), of the dtype of `x` or float32; None shifts by 0.
        eps: added to the variance, which is the biased one (divided by width).
        residual: of the shape and dtype of `x`; x + residual is then normalised and returned as well.

    Returns:
        y like `x`, or with a residual (y, x + residual).

    Raises:
        ValueError: a shape, dtype or device does not fit, or eps is negative; the message names the argument.
    """
    x, weight, bias, residual = to_float32(x, weight, bias, residual)
    check_tensors("layer_norm", x=x)
    check_float("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm: x has shape {tuple(x.shape)}; it must be (…, width) with a width of at least 1")
    if not (is_number(eps) and eps >= 0):
        raise ValueError(f"layer_norm: eps is {eps!r}; it must be at least 0 and below 2⁶³")
    check_shape("layer_norm", "residual", residual, x.shape, "the shape of x")
    check_same("layer_norm", "x", x, residual=residual)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape("layer_norm", name, parameter, x.shape[-1:], "the last dimension of x")
        either = parameter is not None and parameter.dtype == torch.float32
        check_same("layer_norm", "x", x, dtype=not either, **{name: parameter})
    if not runs_triton(x):
        return reference(x, weight, bias, eps=eps, residual=residual)
    y, summed, _, _ = _forward_op(x, weight, bias, residual, eps)
    return y if residual is None else (y, summed)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    summed = x if residual is None else x + residual
    # Not F.layer_norm on 16-bit tensors: its CPU backward sums the gradients of weight and bias in 16 bits. Over 2,048
    # rows of 768 in bfloat16 they were wrong by 4% of the largest where these are by 0.2%.
    wide = accumulation_dtype(x.dtype)
    scale, shift = (p if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(summed.to(wide), x.shape[-1:], scale, shift, eps).to(x.dtype)
    return y if residual is None else (y, summed)


# A row up to BLOCK_COLUMNS wide is read once. A wider one is read twice, a block of columns to a program.
_FORWARD = LaunchTable(
    "layer_norm forward",
    {
        80: (
            Configuration(8192, 32, {"BLOCK_COLUMNS": 8192, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=3),
            Configuration(16384, 16, {"BLOCK_COLUMNS": 16384, "BLOCK_ELEMENTS": 16384, "PROGRAMS": 1}, num_stages=2),
            Configuration(1 << 31, 16, {"BLOCK_COLUMNS": 4096, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=3),
        )
    },
    FORWARD_CANDIDATES,
)
_BACKWARD = LaunchTable(
    "layer_norm backward",
    {
        80: (
            Configuration(4096, 16, {"BLOCK_COLUMNS": 4096, "BLOCK_ELEMENTS": 4096, "PROGRAMS": 1}, num_stages=3),
            Configuration(8192, 32, {"BLOCK_COLUMNS": 8192, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=2),
            # The fewer warps, the more of the registers are the rows': carried rows and their sums take 224 of 255.
            Configuration(16384, 8, {"BLOCK_COLUMNS": 16384, "BLOCK_ELEMENTS": 16384, "PROGRAMS": 1}, num_stages=2),
            Configuration(1 << 31, 16, {"BLOCK_COLUMNS": 4096, "BLOCK_ELEMENTS": 8192, "PROGRAMS": 1}, num_stages=2),
        )
    },
    BACKWARD_CANDIDATES,
)


if HAS_TRITON:

    @triton.jit
    def _block_moments(x, in_width, count, SINGLE: tl.constexpr):
        """The deviations from each row's mean over its block, that mean, and the sum of the squared deviations."""
        mean = tl.sum(x, axis=1) / count
        # The padding columns hold 0, which is not their row's mean.
        deviations = tl.where(in_width[None, :], x - mean[:, None], 0.0)
        if SINGLE:
            # A sum of large float32 numbers has lost digits of the mean; the deviations still have them.
            lost = tl.sum(deviations, axis=1) / count
            mean += lost
            # From the deviations, not from x: the mean itself, rounded, has no room for those digits.
            deviations = tl.where(in_width[None, :], deviations - lost[:, None], 0.0)
        return deviations, mean, tl.sum(deviations * deviations, axis=1)

    @triton.jit(do_not_specialize=["rows"])
    def _moments(
        x_ptr,
        residual_ptr,
        summed_ptr,
        means_ptr,
        squares_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """For each row and block of columns: the mean, and the sum of squared deviations from it. And x + residual."""
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        count = tl.minimum(width - start, BLOCK_COLUMNS)
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
            _, mean, squares = _block_moments(x, in_width, count, x_ptr.dtype.element_ty == tl.float32)
            store_part(means_ptr, row, in_rows, mean)
            store_part(squares_ptr, row, in_rows, squares)

    @triton.jit(do_not_specialize=["rows"])
    def _forward(
        x_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        means_ptr,
        squares_ptr,
        y_ptr,
        summed_ptr,
        mean_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        eps,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:  # read once a program
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            shift = tl.load(bias_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32)
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
            if means_ptr is None:  # the block holds the whole row
                single = x_ptr.dtype.element_ty == tl.float32
                deviations, mean, squares = _block_moments(x, in_width, width, single)
            else:
                # Chan, Golub and LeVeque: each block deviates from its own mean; the spread of these is added.
                counts = tl.minimum(tl.maximum(width - tl.arange(0, PARTS) * BLOCK_COLUMNS, 0), BLOCK_COLUMNS)[None, :]
                means = load_parts(means_ptr, row, in_rows, PARTS)
                mean = tl.sum(means * counts, axis=1) / width
                mean += tl.sum((means - mean[:, None]) * counts, axis=1) / width  # digits lost among large numbers
                spread = means - mean[:, None]
                squares = load_parts(squares_ptr, row, in_rows, PARTS) + spread * spread * counts
                squares = tl.sum(squares, axis=1)
                deviations = x - mean[:, None]
            rstd = tl.rsqrt(squares / width + eps)
            y = deviations * rstd[:, None]
            if weight_ptr is not None:
                y = y * scale[None, :]
            if bias_ptr is not None:
                y = y + shift[None, :]
            store_block(y_ptr, row * width + start, columns, y, mask)
            mine = row < tl.where(start == 0, rows, 0)  # the first column block's program writes the statistics
            tl.store(mean_ptr + row, mean, mask=mine)
            tl.store(rstd_ptr + row, rstd, mask=mine)

    @triton.jit(do_not_specialize=["rows"])
    def _projections(
        dy_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        rstd_ptr,
        values_ptr,
        projections_ptr,
        dy_stride,
        x_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """The parts of each row's Σ v and Σ v · x̂."""
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32)
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_block(x_ptr, row * x_stride + start, columns, mask)
            v = load_block(dy_ptr, row * dy_stride + start, columns, mask)
            mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            if weight_ptr is not None:
                v = v * scale[None, :]
            # No mask on the padding columns: v is 0 there.
            normed = (x - mean[:, None]) * rstd[:, None]
            store_part(values_ptr, row, in_rows, tl.sum(v, axis=1))
            store_part(projections_ptr, row, in_rows, tl.sum(v * normed, axis=1))

    @triton.jit(do_not_specialize=["rows"])
    def _backward(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        rstd_ptr,
        values_ptr,
        projections_ptr,
        dx_ptr,
        dweight_ptr,
        dbias_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        sums_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        start = tl.program_id(1) * BLOCK_COLUMNS
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = start + columns < width
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + start + columns, mask=in_width, other=0.0).to(tl.float32)
            dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        if dbias_ptr is not None:
            dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            in_rows = row < rows
            mask = in_rows[:, None] & in_width[None, :]
            x = load_block(x_ptr, row * x_stride + start, columns, mask)
            v = load_block(dy_ptr, row * dy_stride + start, columns, mask)
            mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            # No mask on the padding columns: v is 0 there, and with it every product that is summed.
            normed = (x - mean[:, None]) * rstd[:, None]
            if dbias_ptr is not None:
                dbias += v
            if weight_ptr is not None:
                dweight += v * normed
                v = v * scale[None, :]
            if values_ptr is None:  # the block holds the whole row
                value = tl.sum(v, axis=1)  # [BLOCK_ROWS]
                projection = tl.sum(v * normed, axis=1)
            else:
                value = tl.sum(load_parts(values_ptr, row, in_rows, PARTS), axis=1)
                projection = tl.sum(load_parts(projections_ptr, row, in_rows, PARTS), axis=1)
            dx = rstd[:, None] * (v - (value / width)[:, None] - normed * (projection / width)[:, None])
            if dsummed_ptr is not None:
                dx += load_block(dsummed_ptr, row * dsummed_stride + start, columns, mask)
            store_block(dx_ptr, row * width + start, columns, dx, mask)
        sums = tl.program_id(0).to(tl.int64) * sums_stride + start
        if weight_ptr is not None:
            tl.store(dweight_ptr + sums + columns, tl.sum(dweight, axis=0), mask=start + columns < sums_stride)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + sums + columns, tl.sum(dbias, axis=0), mask=start + columns < sums_stride)

    @triton.jit(do_not_specialize=["rows"])
    def _backward_carried(
        dy_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        rstd_ptr,
        dx_ptr,
        dweight_ptr,
        dbias_ptr,
        dy_stride,
        x_stride,
        sums_stride,
        rows,
        WIDTH: tl.constexpr,  # known to the compiler, a mask that keeps every column costs no register
        BLOCK_COLUMNS: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """`_backward` for whole rows that are held in 16 bits, each from the turn that sums it to the next."""
        columns = tl.arange(0, BLOCK_COLUMNS)
        in_width = columns < WIDTH
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0)
            dweight = tl.zeros([BLOCK_COLUMNS], tl.float32)
        if dbias_ptr is not None:
            dbias = tl.zeros([BLOCK_COLUMNS], tl.float32)
        x = tl.zeros([BLOCK_COLUMNS], x_ptr.dtype.element_ty)
        dy = tl.zeros([BLOCK_COLUMNS], dy_ptr.dtype.element_ty)
        mean, rstd, shift, pull = 0.0, 0.0, 0.0, 0.0
        step = tl.num_programs(0)
        # One turn more than rows: nothing is written in the first and nothing loaded in the last.
        for turn in tl.range(tl.program_id(0), rows + step, step, num_stages=STAGES):
            row = tl.cast(turn, tl.int64)
            summed_row = row - step
            v = dy.to(tl.float32)
            if weight_ptr is not None:
                v = v * scale.to(tl.float32)
            dx = rstd * (v - shift - (x.to(tl.float32) - mean) * pull)
            mask = in_width & (summed_row >= 0)
            tl.store(dx_ptr + summed_row * WIDTH + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            mask = in_width & (row < rows)
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0)
            if weight_ptr is not None:
                # The weights stay as they are. The compiler, which cannot know, for it allows for a sum past 2³¹, keeps
                # them in 16 bits rather than convert them once, before the loop.
                scale = tl.where(summed_row < rows, scale, x.to(scale.dtype))
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            # No mask on the padding columns: v is 0 there, and with it every product that is summed.
            v = dy.to(tl.float32)
            if dbias_ptr is not None:
                dbias += v
            normed = (x.to(tl.float32) - mean) * rstd
            if weight_ptr is not None:
                dweight += v * normed
                v = v * scale.to(tl.float32)
            shift = tl.sum(v, axis=0) / WIDTH
            pull = rstd * tl.sum(v * normed, axis=0) / WIDTH
        sums = tl.program_id(0).to(tl.int64) * sums_stride
        if weight_ptr is not None:
            tl.store(dweight_ptr + sums + columns, dweight, mask=columns < sums_stride)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + sums + columns, dbias, mask=columns < sums_stride)


def _launch_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty_like(y) if residual is not None else x.new_empty(0)
    width = x.shape[-1]
    rows = x.numel() // width
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return y, summed, mean, rstd
    x_rows = as_rows(x)
    residual_rows = as_rows(residual) if residual is not None else None
    weight = weight.contiguous() if weight is not None else None
    bias = bias.contiguous() if bias is not None else None
    division = divide(rows, width, _FORWARD, x.device)
    means = squares = None
    if division.column_blocks > 1:
        means, squares = division.parts(rows, x.device), division.parts(rows, x.device)
        _moments[division.grid](
            x_rows, residual_rows, summed, means, squares,
            x_rows.stride(0), row_stride(residual_rows), rows, width, **division.options,
        )  # fmt: skip
        if residual is not None:
            x_rows, residual_rows = summed.view(rows, width), None
    _forward[division.grid](
        x_rows, weight, bias, residual_rows, means, squares, y, summed, mean, rstd,
        x_rows.stride(0), row_stride(residual_rows), rows, width, eps,
        PARTS=division.padded_parts, **division.options,
    )  # fmt: skip
    return y, summed, mean, rstd


def _launch_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = rstd.numel()
    if rows == 0:
        return dx, _zeros_like(weight, x), _zeros_like(bias, x)
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dsummed_rows = as_rows(dsummed) if dsummed is not None else None
    scale = weight.contiguous() if weight is not None else None
    # A third row in flight, the gradient of the sum, takes the one register that a carried row leaves.
    carries = can_carry(x) and dsummed is None
    division = divide(rows, width, _BACKWARD, x.device, None if carries else FLOAT32_COLUMNS)
    dweight = division.sums(x.device) if weight is not None else None
    dbias = division.sums(x.device) if bias is not None else None
    if division.carried:
        _backward_carried[division.grid](
            dy_rows, x_rows, scale, mean, rstd, dx, dweight, dbias,
            dy_rows.stride(0), x_rows.stride(0), division.sums_stride, rows, width, **division.carried_options,
        )  # fmt: skip
    else:
        values = projections = None
        if division.column_blocks > 1:
            values, projections = division.parts(rows, x.device), division.parts(rows, x.device)
            _projections[division.grid](
                dy_rows, x_rows, scale, mean, rstd, values, projections,
                dy_rows.stride(0), x_rows.stride(0), rows, width, **division.options,
            )  # fmt: skip
        _backward[division.grid](
            dy_rows, dsummed_rows, x_rows, scale, mean, rstd, values, projections, dx, dweight, dbias,
            dy_rows.stride(0), row_stride(dsummed_rows), x_rows.stride(0), division.sums_stride, rows, width,
            PARTS=division.padded_parts, **division.options,
        )  # fmt: skip
    return (
        dx,
        sum_over_programs(dweight, weight) if weight is not None else x.new_empty(0),
        sum_over_programs(dbias, bias) if bias is not None else x.new_empty(0),
    )


def _zeros_like(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The gradient of `parameter` where `x` has no rows; empty where there is no parameter."""
    return torch.zeros_like(parameter) if parameter is not None else x.new_empty(0)


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape)
    summed = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return y, summed, mean, torch.empty_like(mean)


def _fake_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dweight, dbias = (p.new_empty(p.shape) if p is not None else mean.new_empty(0) for p in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


_forward_op = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, residual, _ = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, bias, mean, rstd)


def _gradients(ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dsummed = dsummed if ctx.has_residual else None
    if dy is None:  # only the sum was used
        return dsummed, None, None, dsummed, None
    dx, dweight, dbias = _backward_op(dy, dsummed, x, weight, bias, mean, rstd)
    return (
        dx,
        dweight if weight is not None else None,
        dbias if bias is not None else None,
        dx if ctx.has_residual else None,
        None,
    )


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


_FLOAT32 = frozenset({"weight", "bias"})


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def affine(x: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x, "weight": normal(x.shape[-1]), "bias": normal(x.shape[-1]), **others}

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (40, 7)):
        yield Sample(f"{rows}x{width}", affine(normal(rows, width)))
    # A mean of 1000 standard deviations, where E[x²] − E[x]² would be nothing but rounding errors.
    for width in (1000, 9001):
        yield Sample(f"large mean, width {width}", affine((1000 + torch.randn(2, width, device=device)).to(dtype)))
    for shape in ((3, 5, 64), (1, 4112)):
        width = shape[-1]
        yield Sample(f"no weight, no bias, width {width}", {"x": normal(*shape)})
        yield Sample(f"no bias, width {width}", {"x": normal(*shape), "weight": normal(width)}, {"eps": 1e-3})
        yield Sample(f"no weight, width {width}", {"x": normal(*shape), "bias": normal(width)})
    yield Sample("float32 weight and bias", affine(normal(5, 64)), float32=_FLOAT32)
    for shape in ((2, 3, 96), (2, 1, 8193), (2, 16400)):
        yield Sample(f"residual, width {shape[-1]}", affine(normal(*shape), residual=normal(*shape)))
    for rows, width in ((9, 8208), (3, 16384)):  # rows that the backward pass carries where they are in 16 bits
        yield Sample(f"carried, width {width}", affine(normal(rows, width)))
    yield Sample("carried, residual", affine(normal(5, 8208), residual=normal(5, 8208)))
    yield Sample("carried, no weight, no bias", {"x": normal(5, 8208)})
    yield Sample("residual, no weight, no bias", {"x": normal(5, 48), "residual": normal(5, 48)})
    yield Sample("three rows", affine(normal(3, 40), residual=normal(3, 40)))
    yield Sample("no rows", affine(normal(0, 40), residual=normal(0, 40)))
    yield Sample("transposed", affine(normal(32, 6).t()))
    yield Sample("row stride", {"x": normal(9, 80)[:, :48], "weight": normal(96)[::2], "bias": normal(1).expand(48)})
    yield Sample("expanded", affine(normal(1, 48).expand(9, 48)))


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    for label, x in residual_streams(dtype, small):
        tensors = {"x": x, "weight": x.new_empty(x.shape[-1]), "bias": x.new_empty(x.shape[-1])}
        yield Sample(label, tensors)
        yield Sample(f"{label}, residual", {**tensors, "residual": torch.empty_like(x)})


def _work(sample: Sample) -> Passes:
    """Forward: the input and what is added in, the norm and the sum out. Backward: the upstream gradients and the row
    that was normalised in, its gradient out; the parameters read, and their gradients written.

    For each element: the sum, the difference, its square, their sum and the scale; backward the difference and the
    scale, a sum, the sum of products, the difference of two products, another and its scale. The weight is a product,
    backward one and the two of its own gradient, the bias a sum in each. What is added in is a sum, backward too."""
    x = sample.tensors["x"]
    weighted, moved, added = (name in sample.tensors for name in ("weight", "bias", "residual"))
    parameters = sample.nbytes("weight", "bias")
    row = sample.nbytes("x", "residual")
    return Passes(
        Work((5 + weighted + moved + added) * x.numel(), 2 * row + parameters),
        Work((9 + 3 * weighted + moved + added) * x.numel(), row + 2 * x.nbytes + sample.nbytes("weight") + parameters),
    )


SPEC = OpSpec(
    name="layer_norm",
    function=layer_norm,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("x", "residual"),
    tables={"forward": _FORWARD, "backward": _BACKWARD},
)
