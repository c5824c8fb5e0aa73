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

from tilewright.kernels.checks import check_float, check_same, check_shape
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable, processors
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import accumulation_dtype, as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl


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
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_float("rms_norm", x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError("rms_norm: x has no dimension; it must be (…, width)")
    check_shape("rms_norm", "weight", weight, x.shape[-1:], "the last dimension of x")
    check_shape("rms_norm", "residual", residual, x.shape, "the shape of x")
    check_same("rms_norm", "x", x, residual=residual)
    check_same("rms_norm", "x", x, dtype=weight is not None and weight.dtype != torch.float32, weight=weight)
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


# A row that fits one block is read once. Wider rows are read twice forward, in blocks of columns.
_WHOLE_ROW = LaunchTable(
    {
        80: (
            Configuration(512, 4, {"BLOCK_ROWS": 8}),
            Configuration(2048, 4, {"BLOCK_ROWS": 2}),
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
        residual_ptr,
        y_ptr,
        summed_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        rows,
        width,
        eps,
        weight_offset,
        HAS_WEIGHT: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK_WIDTH)
        in_width = columns < width
        if HAS_WEIGHT:  # read once a program
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
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
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)  # [BLOCK_ROWS]
            y = x * rstd[:, None]
            if HAS_WEIGHT:
                y = y * scale[None, :]
            tl.store(y_ptr + row[:, None] * width + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(rstd_ptr + row, rstd, mask=row < rows)

    @triton.jit
    def _forward_wide(
        x_ptr,
        weight_ptr,
        residual_ptr,
        y_ptr,
        summed_ptr,
        rstd_ptr,
        x_stride,
        residual_stride,
        width,
        eps,
        weight_offset,
        HAS_WEIGHT: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        squares = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                r = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
                s = (x + r).to(summed_ptr.dtype.element_ty)
                tl.store(summed_ptr + row * width + columns, s, mask=mask)
                x = s.to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        tl.store(rstd_ptr + row, rstd)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            if HAS_RESIDUAL:
                x = tl.load(summed_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            y = x * rstd
            if HAS_WEIGHT:
                y = y * (tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + weight_offset)
            tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward(
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
        rows,
        width,
        weight_offset,
        HAS_WEIGHT: tl.constexpr,
        HAS_DSUMMED: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        columns = tl.arange(0, BLOCK_WIDTH)
        in_width = columns < width
        if HAS_WEIGHT:
            scale = tl.load(weight_ptr + columns, mask=in_width, other=0.0).to(tl.float32) + weight_offset
            dweight = tl.zeros([BLOCK_WIDTH], tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
            row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            mask = (row < rows)[:, None] & in_width[None, :]  # [BLOCK_ROWS, BLOCK_WIDTH]
            x = tl.load(x_ptr + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            normed = x * rstd[:, None]
            v = dy
            if HAS_WEIGHT:
                dweight += tl.sum(dy * normed, axis=0)
                v = dy * scale[None, :]
            dx = rstd[:, None] * (v - normed * (tl.sum(v * normed, axis=1) / width)[:, None])
            if HAS_DSUMMED:
                ds = tl.load(dsummed_ptr + row[:, None] * dsummed_stride + columns[None, :], mask=mask, other=0.0)
                dx += ds.to(tl.float32)
            tl.store(dx_ptr + row[:, None] * width + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_WEIGHT:
            tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + columns, dweight, mask=in_width)

    @triton.jit
    def _backward_input_wide(
        dy_ptr,
        dsummed_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        dx_ptr,
        dy_stride,
        dsummed_stride,
        x_stride,
        width,
        weight_offset,
        HAS_WEIGHT: tl.constexpr,
        HAS_DSUMMED: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        rstd = tl.load(rstd_ptr + row)
        projections = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                v = v * (tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + weight_offset)
            projections += v * x * rstd
        projection = tl.sum(projections, axis=0) / width
        for start in range(0, width, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                v = v * (tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + weight_offset)
            dx = rstd * (v - x * rstd * projection)
            if HAS_DSUMMED:
                dx += tl.load(dsummed_ptr + row * dsummed_stride + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_weight_wide(
        dy_ptr,
        x_ptr,
        rstd_ptr,
        dweight_ptr,
        dy_stride,
        x_stride,
        rows,
        width,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < width
        dweight = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for r in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tl.cast(r, tl.int64)
            x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            dweight += dy * x * tl.load(rstd_ptr + row)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + columns, dweight, mask=mask)


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
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty_like(y) if residual is not None else x.new_empty(0)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, summed, rstd
    x_rows = as_rows(x)
    residual_rows = as_rows(residual) if residual is not None else x_rows
    weight = weight.contiguous() if weight is not None else None
    flags = {"HAS_WEIGHT": weight is not None, "HAS_RESIDUAL": residual is not None}
    pointers = (x_rows, weight if weight is not None else x_rows, residual_rows, y, summed, rstd)
    strides = (x_rows.stride(0), residual_rows.stride(0))
    if width <= _WHOLE_ROW.largest():
        programs, constants = _whole_row_launch(width, rows, x.device)
        _forward[(programs,)](*pointers, *strides, rows, width, eps, weight_offset, **flags, **constants)
    else:
        constants = _wide_row_launch(width, x.device)
        _forward_wide[(rows,)](*pointers, *strides, width, eps, weight_offset, **flags, **constants)
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
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    dsummed_rows = as_rows(dsummed) if dsummed is not None else dy_rows
    weight = weight.contiguous() if weight is not None else None
    flags = {"HAS_WEIGHT": weight is not None, "HAS_DSUMMED": dsummed is not None}
    strides = (dy_rows.stride(0), dsummed_rows.stride(0), x_rows.stride(0))
    inputs = (dy_rows, dsummed_rows, x_rows, weight if weight is not None else x_rows, rstd)
    if width <= _WHOLE_ROW.largest():
        programs, constants = _whole_row_launch(width, rows, x.device)
        partials = torch.empty(programs if weight is not None else 0, width, dtype=torch.float32, device=x.device)
        _backward[(programs,)](*inputs, dx, partials, *strides, rows, width, weight_offset, **flags, **constants)
    else:
        constants = _wide_row_launch(width, x.device)
        _backward_input_wide[(rows,)](*inputs, dx, *strides, width, weight_offset, **flags, **constants)
        column_blocks = triton.cdiv(width, constants["BLOCK_COLUMNS"])
        programs = min(rows, triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors(x.device), column_blocks))
        partials = torch.empty(programs if weight is not None else 0, width, dtype=torch.float32, device=x.device)
        if weight is not None:
            _backward_weight_wide[(programs, column_blocks)](
                dy_rows, x_rows, rstd, partials, dy_rows.stride(0), x_rows.stride(0), rows, width, **constants
            )
    return dx, partials.sum(0).to(weight.dtype) if weight is not None else x.new_empty(0)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape)
    summed = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    return y, summed, x.new_empty(x.numel() // x.shape[-1] if x.shape[-1] else 0, dtype=torch.float32)


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


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (2, 8200), (127, 7)):
        yield Sample(f"{rows}x{width}", {"x": normal(rows, width), "weight": normal(width)})
    yield Sample("no weight", {"x": normal(3, 5, 64)})
    yield Sample("weight offset", {"x": normal(5, 64), "weight": normal(64)}, {"weight_offset": 1.0, "eps": 1e-5})
    for width in (96, 8193):
        tensors = {"x": normal(2, 3, width), "weight": normal(width), "residual": normal(2, 3, width)}
        yield Sample(f"residual, width {width}", tensors)
    yield Sample("three rows", {"x": normal(3, 40), "weight": normal(40), "residual": normal(3, 40)})
    yield Sample("transposed", {"x": normal(32, 6).t(), "weight": normal(32)})
    yield Sample("row stride", {"x": normal(9, 80)[:, :48], "weight": normal(48)})
    yield Sample("expanded", {"x": normal(1, 48).expand(9, 48), "weight": normal(48)})


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for width in (768, 2048, 4096, 8192, 16384):
        x = torch.empty(4096, width, dtype=dtype)
        yield Sample(f"4096x{width}", {"x": x, "weight": x.new_empty(width)})
        yield Sample(f"4096x{width} residual", {"x": x, "weight": x.new_empty(width), "residual": torch.empty_like(x)})


SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    flops=lambda sample: 5 * sample.tensors["x"].numel(),
    compulsory_bytes=lambda sample: 2 * sample.nbytes("x", "residual") + sample.nbytes("weight"),
    strided=("x", "residual"),
    tables={"whole row": _WHOLE_ROW, "wide row": _WIDE_ROW},
)
