"""Layer normalisation along the last dimension (Ba, Kiros and Hinton 2016, arXiv:1607.06450).

    mean = mean(x)          rstd = 1 / sqrt(mean((x − mean)²) + eps)          y = (x − mean) · rstd · weight + bias

With a `residual` the sum s = x + residual is normalised instead and returned beside y, in one pass.

Backward, for an upstream gradient g of y, with x̂ = (x − mean) · rstd and v = g · weight:

    dx = rstd · (v − mean(v) − x̂ · mean(v · x̂))       dweight = Σ_rows g · x̂       dbias = Σ_rows g

A gradient of s is added to dx, which then is the gradient of both x and residual.

Shapes: x (…, width), any strides; weight and bias (width,). Dtypes: float32, float16, bfloat16 (float64 in the
reference). All arithmetic is float32. The variance is the mean of squared deviations from a mean computed before,
never E[x²] − E[x]², which loses every digit where the mean is large against the deviations. A row too wide for
registers takes Welford's running update instead (1962), one running mean in each lane, combined at the end by the rule
of Chan, Golub and LeVeque (1979). dweight and dbias are summed in float32, first per program over its rows, then over
the programs in a fixed order, so that two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same, check_shape
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable, processors
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import accumulation_dtype, as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl


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
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_float("layer_norm", x=x, weight=weight, bias=bias)
    if x.ndim == 0:
        raise ValueError("layer_norm: x has no dimension; it must be (…, width)")
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


# A row that fits one block is read once. Wider rows are read twice, in blocks of columns.
_WHOLE_ROW = LaunchTable(
    {
        80: (
            Configuration(128, 4, {"BLOCK_ROWS": 16}),
            Configuration(512, 4, {"BLOCK_ROWS": 4}),
            Configuration(1024, 4, {"BLOCK_ROWS": 2}),
            Configuration(2048, 4, {"BLOCK_ROWS": 1}),
            Configuration(4096, 8, {"BLOCK_ROWS": 1}),
            Configuration(8192, 16, {"BLOCK_ROWS": 1}),
        )
    }
)
_WIDE_ROW = LaunchTable({80: (Configuration(1 << 31, 16, {"BLOCK_COLUMNS": 4096}),)})
# Programs a processor: enough loads in flight to hide memory latency.
_PROGRAMS_PER_PROCESSOR = 4


if HAS_TRITON:

    @triton.jit
    def _forward(
        x_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        summed_ptr,
        mean_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        eps,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK_WIDTH)
        in_width = columns < width
        if HAS_WEIGHT:  # read once a program
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias_ptr + columns, mask=in_width, other=0.0).to(tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
            # int64: rows × stride may pass 2³¹
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            mask = (row < rows)[:, None] & in_width[None, :]  # [BLOCK_ROWS, BLOCK_WIDTH]
            x = tl.load(x_ptr + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                r = tl.load(residual_ptr + row[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
                # Rounded to the stored dtype first: the norm is taken of what is returned.
                s = (x + r.to(tl.float32)).to(summed_ptr.dtype.element_ty)
                tl.store(summed_ptr + row[:, None] * width + columns[None, :], s, mask=mask)
                x = s.to(tl.float32)
            mean = tl.sum(x, axis=1) / width  # [BLOCK_ROWS]
            # The padding columns hold 0, which is not their row's mean.
            centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)
            if x_ptr.dtype.element_ty == tl.float32:
                # A sum of large numbers has lost digits of the mean; the deviations still have them. 16-bit x has not.
                mean += tl.sum(centred, axis=1) / width
                centred = tl.where(in_width[None, :], x - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
            y = centred * rstd[:, None]
            if HAS_WEIGHT:
                y = y * scale[None, :]
            if HAS_BIAS:
                y = y + shift[None, :]
            tl.store(y_ptr + row[:, None] * width + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(mean_ptr + row, mean, mask=row < rows)
            tl.store(rstd_ptr + row, rstd, mask=row < rows)

    @triton.jit
    def _forward_wide(
        x_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        summed_ptr,
        mean_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        width,
        eps,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        # Welford: each lane keeps the mean and the sum of squared deviations of the columns that it has seen.
        means = tl.zeros([BLOCK_COLUMNS], tl.float32)
        squares = tl.zeros([BLOCK_COLUMNS], tl.float32)
        counts = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                r = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
                s = (x + r).to(summed_ptr.dtype.element_ty)
                tl.store(summed_ptr + row * width + columns, s, mask=mask)
                x = s.to(tl.float32)
            deviation = tl.where(mask, x - means, 0.0)
            means += deviation / (start // BLOCK_COLUMNS + 1)
            squares += tl.where(mask, deviation * (x - means), 0.0)
            counts += mask.to(tl.float32)
        # Chan, Golub and LeVeque: the lanes' deviations are from their own means, so the spread of these is added.
        mean = tl.sum(means * counts, axis=0) / width
        mean += tl.sum(counts * (means - mean), axis=0) / width  # the digits that a sum of large numbers has lost
        spread = means - mean
        rstd = tl.rsqrt(tl.sum(squares + counts * spread * spread, axis=0) / width + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            if HAS_RESIDUAL:
                x = tl.load(summed_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean) * rstd
            if HAS_WEIGHT:
                y = y * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                y = y + tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        rstd_ptr,
        dx_ptr,
        dweight_ptr,
        dbias_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        rows,
        width,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_DSUMMED: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK_WIDTH)
        in_width = columns < width
        if HAS_WEIGHT:
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0).to(tl.float32)
            dweight = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        if HAS_BIAS:
            dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            mask = (row < rows)[:, None] & in_width[None, :]  # [BLOCK_ROWS, BLOCK_WIDTH]
            x = tl.load(x_ptr + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            # No mask on the padding columns: dy is 0 there, and with it every product that is summed.
            normed = (x - mean[:, None]) * rstd[:, None]
            v = dy
            if HAS_WEIGHT:
                dweight += dy * normed
                v = dy * scale[None, :]
            if HAS_BIAS:
                dbias += dy
            projection = tl.sum(v * normed, axis=1) / width  # [BLOCK_ROWS]
            dx = rstd[:, None] * (v - (tl.sum(v, axis=1) / width)[:, None] - normed * projection[:, None])
            if HAS_DSUMMED:
                ds = tl.load(dsummed_ptr + row[:, None] * dsummed_stride + columns[None, :], mask=mask, other=0.0)
                dx += ds.to(tl.float32)
            tl.store(dx_ptr + row[:, None] * width + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        partial = tl.program_id(0).to(tl.int64) * width + columns
        if HAS_WEIGHT:
            tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=in_width)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=in_width)

    @triton.jit
    def _backward_input_wide(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        mean_ptr,
        rstd_ptr,
        dx_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        width,
        HAS_WEIGHT: tl.constexpr,
        HAS_DSUMMED: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        values = tl.zeros([BLOCK_COLUMNS], tl.float32)
        projections = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                v = v * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            values += v
            projections += v * (x - mean) * rstd
        value = tl.sum(values, axis=0) / width
        projection = tl.sum(projections, axis=0) / width
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                v = v * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            dx = rstd * (v - value - (x - mean) * rstd * projection)
            if HAS_DSUMMED:
                dx += tl.load(dsummed_ptr + row * dsummed_stride + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_weight_wide(
        dy_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        dweight_ptr,
        dbias_ptr,
        dy_stride,
        x_stride,
        rows,
        width,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < width
        dweight = tl.zeros([BLOCK_COLUMNS], tl.float32)
        dbias = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for r in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tl.cast(r, tl.int64)
            dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
                dweight += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
            if HAS_BIAS:
                dbias += dy
        partial = tl.program_id(0).to(tl.int64) * width + columns
        if HAS_WEIGHT:
            tl.store(dweight_ptr + partial, dweight, mask=mask)
        if HAS_BIAS:
            tl.store(dbias_ptr + partial, dbias, mask=mask)


def _whole_row_launch(width: int, rows: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs and constexprs of a launch in which each row fits one block."""
    configuration = _WHOLE_ROW.pick(width, device)
    block_rows = configuration.blocks["BLOCK_ROWS"]
    programs = min(triton.cdiv(rows, block_rows), _PROGRAMS_PER_PROCESSOR * processors(device))
    constants = {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": triton.next_power_of_2(width)}
    return programs, {**constants, "num_warps": configuration.num_warps}


def _wide_row_launch(width: int, device: torch.device) -> dict[str, int]:
    configuration = _WIDE_ROW.pick(width, device)
    return {"BLOCK_COLUMNS": configuration.blocks["BLOCK_COLUMNS"], "num_warps": configuration.num_warps}


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
    rows = x.numel() // width if width else 0
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return y, summed, mean, rstd
    x_rows = as_rows(x)
    residual_rows = as_rows(residual) if residual is not None else x_rows
    scale = weight.contiguous() if weight is not None else x_rows
    shift = bias.contiguous() if bias is not None else x_rows
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    pointers = (x_rows, scale, shift, residual_rows, y, summed, mean, rstd)
    strides = (x_rows.stride(0), residual_rows.stride(0))
    if width <= _WHOLE_ROW.largest():
        programs, constants = _whole_row_launch(width, rows, x.device)
        _forward[(programs,)](*pointers, *strides, rows, width, eps, **flags, **constants)
    else:
        constants = _wide_row_launch(width, x.device)
        _forward_wide[(rows,)](*pointers, *strides, width, eps, **flags, **constants)
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
        return dx, _summed(x.new_zeros(0, width), weight), _summed(x.new_zeros(0, width), bias)
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    dsummed_rows = as_rows(dsummed) if dsummed is not None else dy_rows
    scale = weight.contiguous() if weight is not None else x_rows
    parameters = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    inputs = (dy_rows, dsummed_rows, x_rows, scale, mean, rstd)
    strides = (dy_rows.stride(0), dsummed_rows.stride(0), x_rows.stride(0))

    def partials(parameter: torch.Tensor | None, programs: int) -> torch.Tensor:
        return torch.empty(programs if parameter is not None else 0, width, dtype=torch.float32, device=x.device)

    if width <= _WHOLE_ROW.largest():
        programs, constants = _whole_row_launch(width, rows, x.device)
        dweight, dbias = partials(weight, programs), partials(bias, programs)
        _backward[(programs,)](
            *inputs, dx, dweight, dbias, *strides, rows, width,
            HAS_DSUMMED=dsummed is not None, **parameters, **constants,
        )  # fmt: skip
    else:
        constants = _wide_row_launch(width, x.device)
        _backward_input_wide[(rows,)](
            *inputs, dx, *strides, width,
            HAS_WEIGHT=weight is not None, HAS_DSUMMED=dsummed is not None, **constants,
        )  # fmt: skip
        column_blocks = triton.cdiv(width, constants["BLOCK_COLUMNS"])
        programs = min(rows, triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors(x.device), column_blocks))
        dweight, dbias = partials(weight, programs), partials(bias, programs)
        if weight is not None or bias is not None:
            _backward_weight_wide[(programs, column_blocks)](
                dy_rows, x_rows, mean, rstd, dweight, dbias, dy_rows.stride(0), x_rows.stride(0), rows, width,
                **parameters, **constants,
            )  # fmt: skip
    return dx, _summed(dweight, weight), _summed(dbias, bias)


def _summed(partials: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
    """The gradient of `parameter` from the programs' float32 sums; empty where there is no parameter."""
    return partials.sum(0).to(parameter.dtype) if parameter is not None else partials.new_empty(0)


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape)
    summed = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    mean = x.new_empty(x.numel() // x.shape[-1] if x.shape[-1] else 0, dtype=torch.float32)
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


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def affine(x: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x, "weight": normal(x.shape[-1]), "bias": normal(x.shape[-1]), **others}

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (2, 8200), (40, 7)):
        yield Sample(f"{rows}x{width}", affine(normal(rows, width)))
    # A mean of 1000 standard deviations, where E[x²] − E[x]² would be nothing but rounding errors.
    for width in (1000, 9001):
        yield Sample(f"large mean, width {width}", affine((1000 + torch.randn(2, width, device=device)).to(dtype)))
    yield Sample("no weight, no bias", {"x": normal(3, 5, 64)})
    yield Sample("no bias", {"x": normal(5, 64), "weight": normal(64)}, {"eps": 1e-3})
    yield Sample("no weight", {"x": normal(5, 64), "bias": normal(64)})
    yield Sample("no bias, wide", {"x": normal(2, 8200), "weight": normal(8200)})
    for width in (96, 8193):
        tensors = affine(normal(2, 3, width), residual=normal(2, 3, width))
        yield Sample(f"residual, width {width}", tensors)
    yield Sample("three rows", affine(normal(3, 40), residual=normal(3, 40)))
    yield Sample("transposed", affine(normal(300, 9).t()))
    yield Sample("row stride", affine(normal(9, 400)[:, :300]))
    yield Sample("expanded", affine(normal(1, 300).expand(9, 300)))


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for width in (768, 2048, 4096, 8192, 16384):
        x = torch.empty(4096, width, dtype=dtype)
        tensors = {"x": x, "weight": x.new_empty(width), "bias": x.new_empty(width)}
        yield Sample(f"4096x{width}", tensors)
        yield Sample(f"4096x{width} residual", {**tensors, "residual": torch.empty_like(x)})


SPEC = OpSpec(
    name="layer_norm",
    function=layer_norm,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    flops=lambda sample: 7 * sample.tensors["x"].numel(),
    compulsory_bytes=lambda sample: 2 * sample.nbytes("x", "residual") + sample.nbytes("weight", "bias"),
    strided=("x", "residual"),
    tables={"whole row": _WHOLE_ROW, "wide row": _WIDE_ROW},
)
