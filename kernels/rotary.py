"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv:2104.09864): each pair of elements of a query or a key is
turned by an angle that grows with the token's position, so that q·k depends on the distance of the two alone.

For a token at position p and pair i, with c = cos[p, i] and s = sin[p, i]:

    first' = first · c − second · s          second' = second · c + first · s

Pair i is (i, i + rotary_dim/2), the half layout of GPT-NeoX and LLaMA checkpoints, or `interleaved` (2i, 2i + 1), that
of RoFormer and GPT-J. Only the first rotary_dim elements of a head turn, where rotary_dim is twice the tables' width;
the others are passed on. The backward turns the upstream gradients by the opposite angles: the same kernel with −s.

Shapes: q (batch, seq, heads, head_dim) and k (batch, seq, kv_heads, head_dim), or packed (tokens, heads, head_dim) and
(tokens, kv_heads, head_dim); cos and sin (max_positions, rotary_dim/2). q and k are read wherever they stand, such as
in one fused projection, so long as the elements of a head are adjacent; else they are copied. Both are turned in one
launch. Dtypes: float32, float16, bfloat16 (float64 in the reference); the tables may be float32 beside 16-bit q and k,
which keeps the angles exact to 24 bits. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import MODELS, batches
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rotary_tables import rotary_tables
from tilewright.kernels.rows import accumulation_dtype

if HAS_TRITON:
    import triton
    import triton.language as tl


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by the angles of their positions.

    Args:
        q: (batch, seq, heads, head_dim) or (tokens, heads, head_dim).
        k: like q, with kv_heads instead of heads.
        cos: (max_positions, rotary_dim/2), of the dtype of q or float32, as `rotary_tables` makes it; no gradient.
        sin: likewise.
        positions: each token's position, int32 or int64, of shape q.shape[:-2]; None counts 0, 1, … along the sequence.
            A position outside the tables is an error on CPU (compiled, one that ends the process); on a GPU, where to
            look would mean to wait, it makes the rotated elements of its token NaN.
        interleaved: pair the elements (2i, 2i + 1) instead of (i, i + rotary_dim/2).

    Returns:
        The rotated q and k, new tensors of their shapes and dtypes.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the tables are too short; the message names the argument.
    """
    check_rotary("rotary", q, k, cos, sin, positions)
    if not runs_triton(q):
        return reference(q, k, cos, sin, positions=positions, interleaved=interleaved)
    q_out, k_out = _forward_op(q, k, cos, sin, positions, interleaved)
    return q_out, k_out


def check_rotary(
    op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> None:
    """What every op that turns q and k asks of them, of the tables and of the positions."""
    check_tensors(op, q=q, k=k, cos=cos, sin=sin)
    check_float(op, q=q, k=k, cos=cos, sin=sin)
    if q.ndim not in (3, 4):
        raise ValueError(
            f"{op}: q has shape {tuple(q.shape)}; it must be (batch, seq, heads, head_dim) or (tokens, heads, head_dim)"
        )
    kv_heads = k.shape[-2] if k.ndim > 1 else 1
    check_shape(op, "k", k, (*q.shape[:-2], kv_heads, q.shape[-1]), "the shape of q but for the heads")
    if cos.ndim != 2 or not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"{op}: cos has shape {tuple(cos.shape)}; it must be (max_positions, rotary_dim / 2), and rotary_dim at "
            f"most the head_dim {q.shape[-1]}"
        )
    check_shape(op, "sin", sin, cos.shape, "the shape of cos")
    check_same(op, "q", q, k=k)
    check_same(op, "q", q, dtype=cos.dtype != torch.float32, cos=cos)
    check_same(op, "cos", cos, sin=sin)
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{op}: {name} asks for a gradient, and the tables take none; pass {name}.detach()")
    if positions is None:
        if cos.shape[0] < q.shape[-3]:
            raise ValueError(
                f"{op}: cos has {cos.shape[0]} positions and q a sequence of {q.shape[-3]}; build longer tables"
            )
        return
    check_tensors(op, positions=positions)
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: positions has dtype {positions.dtype}; it must be int32 or int64")
    check_shape(op, "positions", positions, q.shape[:-2], "the shape of q without heads and head_dim")
    check_same(op, "q", q, dtype=False, positions=positions)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    return turned("rotary", q, k, cos, sin, positions, interleaved)


def turned(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned in plain PyTorch, for `op`."""
    if positions is None:
        cos, sin = cos[: q.shape[-3]], sin[: q.shape[-3]]
    else:
        cos, sin = _at(op, positions, cos), _at(op, positions, sin)
    wide = accumulation_dtype(q.dtype)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # (…, seq, 1, rotary_dim / 2)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _at(op: str, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The table's rows at `positions`; an embedding refuses negative ones, which an index would count from the end."""
    try:
        return F.embedding(positions, table)
    except IndexError as error:
        raise ValueError(
            f"{op}: positions holds a position outside the tables; it must be 0 … {table.shape[0] - 1}"
        ) from error


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = cos.shape[-1]
    # Split, not sliced: the gradient of a split is one concatenation, that of each slice a tensor of zeros to add to.
    if 2 * half < x.shape[-1]:
        turning, rest = x.split([2 * half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat((_rotated(turning, cos, sin, interleaved), rest), dim=-1)
    pairs = x.unflatten(-1, (half, 2)).unbind(-1) if interleaved else x.split([half, half], dim=-1)
    first, second = (part.to(cos.dtype) for part in pairs)
    turned = (
        torch.addcmul(first * cos, second, sin, value=-1).to(x.dtype),
        torch.addcmul(second * cos, first, sin).to(x.dtype),
    )
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


# By the width of one token's queries (heads · head_dim): a program turns one token, so that it reads cos and sin once,
# in blocks of heads of about so many elements.
_TABLE = LaunchTable(
    "rotary token",
    {
        80: (
            Configuration(1024, 1, {"BLOCK_ELEMENTS": 1024}),
            Configuration(1 << 31, 4, {"BLOCK_ELEMENTS": 4096}),
        )
    },
    tuple(
        Configuration(1 << 31, warps, {"BLOCK_ELEMENTS": elements})
        for elements, warps in ((2048, 2), (2048, 4), (4096, 8))
    ),
)


if HAS_TRITON:

    @triton.jit
    def _forward_or_backward(
        q_ptr,
        k_ptr,
        cos_ptr,
        sin_ptr,
        positions_ptr,
        q_out_ptr,
        k_out_ptr,
        q_batch_stride,
        q_seq_stride,
        q_head_stride,
        k_batch_stride,
        k_seq_stride,
        k_head_stride,
        positions_batch_stride,
        positions_seq_stride,
        seq,
        heads,
        kv_heads,
        max_positions,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        HAS_POSITIONS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        CONJUGATE: tl.constexpr,
        BLOCK_Q_HEADS: tl.constexpr,
        BLOCK_K_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
        BLOCK_REST: tl.constexpr,
    ):
        # int64: a token × its stride may pass 2³¹; divided before, since a division in int64 is slow.
        token = tl.program_id(0).to(tl.int64)
        batch = (tl.program_id(0) // seq).to(tl.int64)
        index = (tl.program_id(0) % seq).to(tl.int64)
        position = index
        in_table = index >= 0  # all of them: the host has compared seq with the tables
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + batch * positions_batch_stride + index * positions_seq_stride)
            position = position.to(tl.int64)
            in_table = (position >= 0) & (position < max_positions)
        pair = tl.arange(0, BLOCK_HALF)
        # Outside the table NaN, which is seen, rather than another tensor's memory, which is not.
        mask = pair < tl.where(in_table, HALF, 0)
        cos = tl.load(cos_ptr + position * HALF + pair, mask=mask, other=float("nan")).to(tl.float32)
        sin = tl.load(sin_ptr + position * HALF + pair, mask=mask, other=float("nan")).to(tl.float32)
        if CONJUGATE:
            sin = -sin
        _turn_heads(
            q_ptr + batch * q_batch_stride + index * q_seq_stride, q_out_ptr + token * heads * HEAD_DIM,
            q_head_stride, heads, cos, sin, HEAD_DIM, HALF, INTERLEAVED, BLOCK_Q_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        _turn_heads(
            k_ptr + batch * k_batch_stride + index * k_seq_stride, k_out_ptr + token * kv_heads * HEAD_DIM,
            k_head_stride, kv_heads, cos, sin, HEAD_DIM, HALF, INTERLEAVED, BLOCK_K_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip

    @triton.jit
    def _turn_heads(
        x_ptr,
        out_ptr,
        head_stride,
        heads,
        cos,
        sin,
        HEAD_DIM: tl.constexpr,
        HALF: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
        BLOCK_REST: tl.constexpr,
    ):
        """Turn all heads of the token that starts at `x_ptr`."""
        dtype = out_ptr.dtype.element_ty
        for start in range(0, heads, BLOCK_HEADS):
            head = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
            x_head = x_ptr + head * head_stride
            out_head = out_ptr + head * HEAD_DIM
            if INTERLEAVED:
                # Whole pairs are loaded and parted in registers: two loads with a stride of 2 would fetch twice.
                element = tl.arange(0, 2 * BLOCK_HALF)[None, :]
                mask = (head < heads) & (element < 2 * HALF)  # [BLOCK_HEADS, 2 · BLOCK_HALF]
                x = tl.load(x_head + element, mask=mask, other=0.0).to(tl.float32)
                first, second = tl.split(tl.reshape(x, [BLOCK_HEADS, BLOCK_HALF, 2]))
                turned = tl.join(first * cos - second * sin, second * cos + first * sin)
                turned = tl.reshape(turned, [BLOCK_HEADS, 2 * BLOCK_HALF])
                tl.store(out_head + element, turned.to(dtype), mask=mask)
            else:
                pair = tl.arange(0, BLOCK_HALF)[None, :]
                mask = (head < heads) & (pair < HALF)  # [BLOCK_HEADS, BLOCK_HALF]
                first = tl.load(x_head + pair, mask=mask, other=0.0).to(tl.float32)
                second = tl.load(x_head + HALF + pair, mask=mask, other=0.0).to(tl.float32)
                tl.store(out_head + pair, (first * cos - second * sin).to(dtype), mask=mask)
                tl.store(out_head + HALF + pair, (second * cos + first * sin).to(dtype), mask=mask)
            if BLOCK_REST:
                element = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
                mask = (head < heads) & (element < HEAD_DIM)  # [BLOCK_HEADS, BLOCK_REST]
                tl.store(out_head + element, tl.load(x_head + element, mask=mask, other=0.0), mask=mask)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q, k = batched(q), batched(k)
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if batch * seq == 0:
        return q_out, k_out
    where = q if positions is None else positions.reshape(-1, seq)  # q stands in for what is never read
    half = cos.shape[1]
    configuration = _TABLE.pick(heads * head_dim, q.device)
    block_heads = max(1, configuration.blocks["BLOCK_ELEMENTS"] // triton.next_power_of_2(head_dim))
    _forward_or_backward[(batch * seq,)](
        q, k, cos.contiguous(), sin.contiguous(), where, q_out, k_out,
        *q.stride()[:3], *k.stride()[:3], *where.stride()[:2], seq, heads, kv_heads, cos.shape[0],
        HEAD_DIM=head_dim,
        HALF=half,
        HAS_POSITIONS=positions is not None,
        INTERLEAVED=interleaved,
        CONJUGATE=conjugate,
        BLOCK_Q_HEADS=min(block_heads, triton.next_power_of_2(max(1, heads))),
        BLOCK_K_HEADS=min(block_heads, triton.next_power_of_2(max(1, kv_heads))),
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
        num_warps=configuration.num_warps,
    )  # fmt: skip
    return q_out, k_out


def batched(x: torch.Tensor) -> torch.Tensor:
    """`x` as (batch, seq, heads, head_dim) with the elements of a head adjacent; packed tokens are one batch."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.ndim == 4 else x.unsqueeze(0)


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(q, k, cos, sin, positions, interleaved, conjugate=False)


def _launch_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(dq, dk, cos, sin, positions, interleaved, conjugate=True)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_forward_op = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> (Tensor, Tensor)",
    _launch_forward,
    _fake,
)
_backward_op = register(
    "rotary_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor? positions, bool interleaved)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, cos, sin, positions, interleaved = inputs
    ctx.interleaved = interleaved
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[Any, ...]:
    return *_backward_op(dq, dk, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


differentiate(_forward_op, _gradients, _setup_context)
refuse_double_backward(_backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def tables(positions: int, rotary_dim: int) -> dict[str, torch.Tensor]:
        cos, sin = rotary_tables(positions, rotary_dim, base=100.0, device=device)
        return {"cos": cos.to(dtype), "sin": sin.to(dtype)}

    def heads(lead: tuple[int, ...], q: int, k: int, head_dim: int) -> dict[str, torch.Tensor]:
        return {"q": normal(*lead, q, head_dim), "k": normal(*lead, k, head_dim)}

    def fused(lead: tuple[int, ...], q: int, k: int, head_dim: int) -> dict[str, torch.Tensor]:
        projected = normal(*lead, (q + 2 * k) * head_dim).unflatten(-1, (q + 2 * k, head_dim))
        return {"q": projected[..., :q, :], "k": projected[..., q : q + k, :]}

    yield Sample("one token", {**heads((1, 1), 1, 1, 2), **tables(1, 2)})
    yield Sample("127 tokens", {**heads((127,), 3, 1, 8), **tables(127, 8)})
    for layout in ("half", "interleaved"):
        options = {"interleaved": layout == "interleaved"}
        yield Sample(f"{layout}, fused", {**fused((2, 3), 4, 2, 16), **tables(5, 16)}, options)
        yield Sample(f"{layout}, partial", {**heads((1, 2), 7, 1, 127), **tables(2, 26)}, options)
        yield Sample(f"{layout}, head_dim 1000", {**heads((2,), 3, 3, 1000), **tables(2, 1000)}, options)
        yield Sample(f"{layout}, head_dim 4097", {**heads((1, 2), 2, 1, 4097), **tables(2, 4000)}, options)
    positions = torch.randint(0, 50, (2, 3), device=device)
    yield Sample("positions", {**heads((2, 3), 3, 1, 8), **tables(50, 8), "positions": positions})
    shared = torch.randint(0, 50, (1, 3), device=device, dtype=torch.int32).expand(2, 3)
    yield Sample("shared positions", {**heads((2, 3), 2, 2, 8), **tables(50, 8), "positions": shared})
    packed = {**fused((5,), 2, 1, 8), **tables(50, 6), "positions": positions.flatten()[1:]}
    yield Sample("packed positions", packed, {"interleaved": True})
    yield Sample("three rows", {**heads((3, 2), 2, 1, 8), **tables(3, 8)})
    by_head = {name: x.transpose(1, 2) for name, x in heads((2, 3), 2, 2, 256).items()}
    yield Sample("no rows", {**heads((0, 2), 2, 1, 8), **tables(3, 8)})
    yield Sample("heads before tokens", {**by_head, **tables(4, 256)})
    apart = {name: x[..., ::2] for name, x in heads((1, 3), 2, 1, 1000).items()}
    yield Sample("elements apart", {**apart, **tables(4, 500)})
    expanded = {"q": normal(1, 3, 1, 256).expand(1, 3, 4, 256), "k": normal(1, 3, 2, 256)}
    yield Sample("expanded", {**expanded, **tables(4, 256)})


class HeadShape(NamedTuple):
    """What the audit turns: the first `rotary_dim` elements of so many heads, and with which options."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    positions: bool = False
    interleaved: bool = False


def fused_samples(others: dict[str, HeadShape], dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    """q and k in one projection, and the tables, at the shapes of `MODELS` and of `others` by their names."""
    models = {model.name: HeadShape(model.heads, model.kv_heads, model.head_dim, model.head_dim) for model in MODELS}
    for name, (heads, kv_heads, head_dim, rotary_dim, with_positions, interleaved) in (models | others).items():
        for length_name, sequences, length in batches(small):
            projected = torch.empty(sequences, length, heads + 2 * kv_heads, head_dim, dtype=dtype)
            q, k, _ = projected.split([heads, kv_heads, kv_heads], dim=2)
            cos, sin = torch.empty(2, length, rotary_dim // 2)
            tensors = {"q": q, "k": k, "cos": cos, "sin": sin}
            if with_positions:
                tensors["positions"] = torch.zeros(sequences, length, dtype=torch.int64)
            yield Sample(f"{name} {length_name}", tensors, {"interleaved": interleaved})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    others = {
        "8B, positions": HeadShape(32, 8, 128, 128, positions=True),
        "125M, interleaved": HeadShape(12, 12, 64, 64, interleaved=True),
        "Phi-2, positions": HeadShape(32, 32, 80, 32, positions=True),
        "GPT-J, positions, interleaved": HeadShape(16, 16, 256, 64, positions=True, interleaved=True),
    }
    return fused_samples(others, dtype, small)


def _work(sample: Sample) -> Passes:
    """Four products and two sums for each pair; q and k in and out, the positions, and a row of each table for every
    position that can occur. Backward turns the gradients back: the same."""
    q, cos = sample.tensors["q"], sample.tensors["cos"]
    heads = sum(sample.tensors[name].shape[:-1].numel() for name in ("q", "k"))
    rows = min(cos.shape[0], q.shape[:-2].numel()) if "positions" in sample.tensors else q.shape[-3]
    moved = 2 * sample.nbytes("q", "k") + sample.nbytes("positions") + 2 * rows * cos.shape[1] * cos.element_size()
    return Passes(*[Work(6 * heads * cos.shape[1], moved)] * 2)


SPEC = OpSpec(
    name="rotary",
    function=rotary,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("q", "k"),
    no_gradient=frozenset({"cos", "sin"}),
    tables={"token": _TABLE},
)
