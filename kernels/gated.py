"""Gated linear units, activation(gate) · up, elementwise (Shazeer 2020, arXiv:2002.05202): what `swiglu` and `geglu`
share. Each brings its activation a as a Triton function that returns a(x) and its slope a′(x).

    y = a(gate) · up

Backward, for an upstream gradient g of y:

    dgate = g · up · a′(gate)          dup = g · a(gate)

Nothing is saved but the inputs: the activation is computed again, which costs less than to read it. Each pass reads
each of its inputs once and writes each of its results once.

Shapes: gate and up (…, width), or one fused input (…, 2·width) whose first half is gate and second half up, as a fused
projection makes it; its gradient is then one tensor too, written in place of two that would have to be joined. Rows are
read wherever they stand; along a row the elements must be adjacent, or else a copy is made. Dtypes: float32, float16,
bfloat16 (float64 in the reference). All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import Op, differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import MODELS, batches
from tilewright.kernels.opspec import Passes, Sample, Work
from tilewright.kernels.rows import as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl


def check_gated(op: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    """Raise ``ValueError`` unless gate and up, or one fused input, fit together."""
    check_tensors(op, gate=gate)
    check_float(op, gate=gate, up=up)
    if gate.ndim == 0:
        raise ValueError(f"{op}: gate has no dimension; it must be (…, width)")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(
            f"{op}: gate has shape {tuple(gate.shape)}; without up its last dimension holds gate and up side by side "
            "and must be even"
        )
    check_shape(op, "up", up, gate.shape, "the shape of gate")
    check_same(op, "gate", gate, up=up)


def halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up themselves, of a fused input as views."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


# Elementwise: 16 elements a thread of each input are enough loads in flight, and every program is short.
TABLE = LaunchTable(
    "gated elementwise",
    {
        80: (
            Configuration(128, 4, {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}),
            Configuration(512, 4, {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}),
            Configuration(1 << 62, 4, {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024}),
        )
    },
    tuple(
        Configuration(1 << 62, warps, {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns})
        for rows, columns, warps in ((2, 1024, 8), (1, 2048, 4), (1, 2048, 8))
    ),
)


if HAS_TRITON:

    @triton.jit
    def _forward(
        gate_ptr,
        up_ptr,
        y_ptr,
        gate_stride,
        up_stride,
        up_offset,
        rows,
        width,
        ACTIVATION: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
        # int64: rows × stride, and one row alone, may pass 2³¹
        row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        column = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (column < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + up_offset + column, mask=mask, other=0.0).to(tl.float32)
        value, _ = ACTIVATION(gate)
        tl.store(y_ptr + row * width + column, (value * up).to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward(
        dy_ptr,
        gate_ptr,
        up_ptr,
        dgate_ptr,
        dup_ptr,
        dy_stride,
        gate_stride,
        up_stride,
        gradient_stride,
        up_offset,
        rows,
        width,
        ACTIVATION: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
        row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        column = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (column < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + up_offset + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = ACTIVATION(gate)
        gradient = row * gradient_stride + column
        tl.store(dgate_ptr + gradient, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
        tl.store(dup_ptr + gradient + up_offset, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)


def _blocks(rows: int, width: int, device: torch.device) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constexprs of a pass over (rows, width) elements."""
    configuration = TABLE.pick(width, device)
    blocks = configuration.blocks
    # One axis: a grid's second stops at 65,535 programs.
    programs = triton.cdiv(rows, blocks["BLOCK_ROWS"]) * triton.cdiv(width, blocks["BLOCK_COLUMNS"])
    return (programs,), {**blocks, "num_warps": configuration.num_warps}


def _y_shape(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[int, ...]:
    return gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)


def _launch_forward(activation: Any, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty(_y_shape(gate, up), dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    gate_rows = as_rows(gate)
    up_rows = as_rows(up) if up is not None else gate_rows
    rows, width = gate_rows.shape[0], y.shape[-1]
    grid, constants = _blocks(rows, width, y.device)
    strides = (gate_rows.stride(0), up_rows.stride(0), width if up is None else 0)
    _forward[grid](gate_rows, up_rows, y, *strides, rows, width, ACTIVATION=activation, **constants)
    return y


def _launch_backward(
    activation: Any, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up; of a fused input that of both, and nothing."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate) if up is not None else gate.new_empty(0)
    if dy.numel() == 0:
        return dgate, dup
    dy_rows, gate_rows = as_rows(dy), as_rows(gate)
    up_rows, dup_rows = (as_rows(up), dup) if up is not None else (gate_rows, dgate)
    rows, width = dy_rows.shape
    grid, constants = _blocks(rows, width, dy.device)
    strides = (dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), gate.shape[-1], width if up is None else 0)
    _backward[grid](
        dy_rows, gate_rows, up_rows, dgate, dup_rows, *strides, rows, width, ACTIVATION=activation, **constants
    )
    return dgate, dup


def _fake_forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    return gate.new_empty(_y_shape(gate, up))


def _fake_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape if up is not None else 0)


def register_gated(name: str, activation: Any) -> Op:
    """Register ``tilewright::NAME`` and its backward pass, and return the op: (gate, up or None) → y.

    Args:
        name: the op's name.
        activation: a Triton function x → (a(x), a′(x)) of float32 blocks; None where there is no triton.
    """

    def forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        return _launch_forward(activation, gate, up)

    def backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return _launch_backward(activation, dy, gate, up)

    forward_op = register(f"{name}(Tensor gate, Tensor? up) -> Tensor", forward, _fake_forward)
    backward_op = register(
        f"{name}_backward(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)", backward, _fake_backward
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate, dup = backward_op(dy, gate, up)
        return dgate, dup if up is not None else None

    differentiate(forward_op, gradients, setup_context)
    refuse_double_backward(backward_op)
    return forward_op


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Separate and fused inputs of odd shapes and strides."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (127, 7)):
        yield Sample(f"{rows}x{width}", {"gate": normal(rows, width), "up": normal(rows, width)})
    for shape in ((7, 254), (2, 3, 2000), (2, 8194), (96,)):
        yield Sample("fused " + "x".join(map(str, shape)), {"gate": normal(*shape)})
    yield Sample("saturated", {"gate": 40 * normal(3, 64), "up": normal(3, 64)})
    yield Sample("three rows", {"gate": normal(3, 40), "up": normal(3, 40)})
    yield Sample("no rows", {"gate": normal(0, 40), "up": normal(0, 40)})
    yield Sample("fused, no rows", {"gate": normal(0, 40)})
    yield Sample("halves of one tensor", dict(zip(("gate", "up"), normal(2, 5, 96).chunk(2, dim=-1), strict=True)))
    yield Sample("transposed", {"gate": normal(300, 9).t(), "up": normal(9, 300)})
    yield Sample("fused, row stride", {"gate": normal(9, 400)[:, :300]})
    yield Sample("fused, transposed", {"gate": normal(300, 9).t()})
    yield Sample("expanded", {"gate": normal(1, 300).expand(9, 300), "up": normal(9, 300)})


def audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    """The feed-forward widths of real models, separate and fused."""
    for model in MODELS:
        for length_name, sequences, length in batches(small):
            fused = torch.empty(sequences, length, 2 * model.hidden, dtype=dtype)
            gate = fused.new_empty(sequences, length, model.hidden)
            yield Sample(f"{model.name} {length_name}, fused", {"gate": fused})
            yield Sample(f"{model.name} {length_name}", {"gate": gate, "up": torch.empty_like(gate)})


def work_of(sample: Sample, activation: int, slope: int) -> Passes:
    """gate and up in, y out, which is half as large; backward reads all three and writes two.

    Args:
        sample: the call.
        activation: operations for the activation of one element of gate.
        slope: those that its slope takes besides.
    """
    inputs = sample.nbytes("gate", "up")
    elements = sum(x.numel() for x in sample.tensors.values()) // 2
    # The product with up; backward that with the activation, and those with up and the slope.
    return Passes(
        Work((activation + 1) * elements, 3 * inputs // 2), Work((activation + slope + 3) * elements, 5 * inputs // 2)
    )
