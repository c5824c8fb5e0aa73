"""The gated linear unit with the swish gate (Shazeer 2020, arXiv:2002.05202): silu(gate) · up, elementwise.

    σ = 1 / (1 + exp(−gate))          y = gate · σ · up

Backward, for an upstream gradient g of y:

    dgate = g · up · σ · (1 + gate · (1 − σ))          dup = g · gate · σ

Nothing is saved but the inputs: σ is computed again, which costs less than to read it. Each pass reads each of its
inputs once and writes each of its results once.

Shapes: gate and up (…, width), or one fused input (…, 2·width) whose first half is gate and second half up, as a fused
projection makes it; its gradient is then one tensor too, written in place of two that would have to be joined. Rows are
read wherever they stand (the halves of a fused tensor are not copied); along a row the elements must be adjacent, or
else a copy is made. Dtypes: float32, float16, bfloat16 (float64 in the reference). All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same, check_shape
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up.

    Args:
        gate: (…, width); without `up`, (…, 2·width): gate and up side by side.
        up: of the shape and dtype of `gate`.

    Returns:
        (…, width), of the dtype of `gate`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_float("swiglu", gate=gate, up=up)
    if gate.ndim == 0:
        raise ValueError("swiglu: gate has no dimension; it must be (…, width)")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate has shape {tuple(gate.shape)}; without up its last dimension holds gate and up side by side "
            "and must be even"
        )
    check_shape("swiglu", "up", up, gate.shape, "the shape of gate")
    check_same("swiglu", "gate", gate, up=up)
    if not runs_triton(gate):
        return reference(gate, up)
    y: torch.Tensor = _forward_op(gate, up)
    return y


def reference(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch."""
    gate, up = _halves(gate, up)
    # No upcast: silu rounds its result to the dtype before the product, as models in plain PyTorch do, and an eager
    # training step is spared float32 copies of its widest activations. Inductor makes it one pass in float32.
    return F.silu(gate) * up


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up themselves, of a fused input as views."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


# Elementwise: 16 elements a thread of each input are enough loads in flight, and every program is short.
_TABLE = LaunchTable(
    {
        80: (
            Configuration(128, 4, {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}),
            Configuration(512, 4, {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 512}),
            Configuration(1 << 31, 4, {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024}),
        )
    }
)


if HAS_TRITON:

    @triton.jit
    def _forward(
        gate_ptr,
        up_ptr,
        y_ptr,
        gate_stride,
        up_stride,
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        # int64: rows × stride may pass 2³¹
        row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (columns < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
        tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)

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
        rows,
        width,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows) & (columns < width)  # [BLOCK_ROWS, BLOCK_COLUMNS]
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = dy * gate * sigmoid
        gradient = row * gradient_stride + columns
        tl.store(dgate_ptr + gradient, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        tl.store(dup_ptr + gradient, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _grid(rows: int, width: int, device: torch.device) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the constexprs of a pass over (rows, width) elements."""
    configuration = _TABLE.pick(width, device)
    blocks = configuration.blocks
    grid = (triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(width, blocks["BLOCK_COLUMNS"]))
    return grid, {**blocks, "num_warps": configuration.num_warps}


def _launch_forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    gate, up = _halves(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    rows, width = gate_rows.shape
    grid, constants = _grid(rows, width, y.device)
    _forward[grid](gate_rows, up_rows, y, gate_rows.stride(0), up_rows.stride(0), rows, width, **constants)
    return y


def _launch_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate) if up is not None else gate.new_empty(0)
    if dy.numel() == 0:
        return dgate, dup
    dgate_half, dup_half = _halves(dgate, dup if up is not None else None)
    gate, up = _halves(gate, up)
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
    rows, width = gate_rows.shape
    strides = (dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), dgate.shape[-1])
    grid, constants = _grid(rows, width, dy.device)
    _backward[grid](dy_rows, gate_rows, up_rows, dgate_half, dup_half, *strides, rows, width, **constants)
    return dgate, dup


def _fake_forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape if up is not None else 0)


_forward_op = register("swiglu(Tensor gate, Tensor? up) -> Tensor", _launch_forward, _fake_forward)
_backward_op = register(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)", _launch_backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    gate, up = ctx.saved_tensors
    dgate, dup = _backward_op(dy, gate, up)
    return dgate, dup if up is not None else None


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for rows, width in ((1, 1), (7, 127), (3, 1000), (2, 4097), (127, 7)):
        yield Sample(f"{rows}x{width}", {"gate": normal(rows, width), "up": normal(rows, width)})
    for shape in ((7, 254), (2, 3, 2000), (2, 8194), (96,)):
        yield Sample("fused " + "x".join(map(str, shape)), {"gate": normal(*shape)})
    yield Sample("saturated", {"gate": 40 * normal(3, 64), "up": normal(3, 64)})
    yield Sample("three rows", {"gate": normal(3, 40), "up": normal(3, 40)})
    yield Sample("halves of one tensor", dict(zip(("gate", "up"), normal(2, 5, 96).chunk(2, dim=-1), strict=True)))
    yield Sample("transposed", {"gate": normal(300, 9).t(), "up": normal(9, 300)})
    yield Sample("fused, row stride", {"gate": normal(9, 400)[:, :300]})
    yield Sample("fused, transposed", {"gate": normal(300, 9).t()})
    yield Sample("expanded", {"gate": normal(1, 300).expand(9, 300), "up": normal(9, 300)})


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for width in (1408, 8192, 14336):
        fused = torch.empty(4096, 2 * width, dtype=dtype)
        yield Sample(f"4096x{width} fused", {"gate": fused})
        yield Sample(f"4096x{width}", {"gate": fused.new_empty(4096, width), "up": fused.new_empty(4096, width)})


SPEC = OpSpec(
    name="swiglu",
    function=swiglu,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    # Per element: exp, add, divide and two products; the result is half as large as what is read.
    flops=lambda sample: 5 * sum(x.numel() for x in sample.tensors.values()) // 2,
    compulsory_bytes=lambda sample: 3 * sample.nbytes("gate", "up") // 2,
    strided=("gate", "up"),
    tables={"elementwise": _TABLE},
)
