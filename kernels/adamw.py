"""AdamW, Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101): many tensors in few launches.

At step t, from the gradient g scaled by `clip`, elementwise:

    m ← m + (1 − β₁)(g − m)                    v ← v + (1 − β₂)(g² − v)
    m̂ = m / (1 − β₁ᵗ)                          v̂ = v / (1 − β₂ᵗ)
    θ ← θ − lr · (m̂ / (√v̂ + eps) + weight_decay · θ)

All arithmetic is float32, 1 − βᵗ float64. θ and g are float32, float16 or bfloat16, m and v float32 or bfloat16 (all
float64 in the reference). An update is often smaller than half a unit in the last place of a bfloat16 number, which
rounded to nearest would never move. Of a bfloat16 parameter therefore either

- the sum is rounded stochastically: up with a probability of the fraction cut off, so that it is right on average; or
- the low 16 bits are kept: with `low_bits` (int16), 2¹⁶ · the bits of θ + low_bits are the bits of a float32 number. θ
  is that number rounded to nearest (ties away from zero), `low_bits` the signed rest, and training equals that of a
  float32 parameter to the bit; or
- it is rounded to nearest all the same.

A bfloat16 m is rounded to nearest, as (1 − β₁)(g − m) is large beside it; a bfloat16 v always stochastically: rounded
to nearest it would never decay, as 1 − β₂ = 0.001 of it is below half a unit in its last place.

The random bits are Philox 4×32-10 (Salmon et al. 2011) of (seed, tensor's number, step, element's number), 32 bits an
element: the low half for θ, the high half for v. They depend on nothing else, so the reference has the same.

`MultiTensor` makes the launches: one advances the steps of all tensors, one per kind of tensor (dtypes; whether 16-byte
loads are possible) makes the update. A launch reads a table of pointers, and a table that says which block of which
tensor each program does; both are made once, and only the pointers of new gradients are sent again. The update reads
each of its inputs once and writes each of its results once. Offsets are int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors, is_number, is_whole
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import register
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import accumulation_dtype

if HAS_TRITON:
    import triton
    import triton.language as tl


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    clip: torch.Tensor | float | None = None,
    low_bits: torch.Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """One step of AdamW on one tensor, out of place; `tilewright.kernels.optim.AdamW` steps many tensors in place.

    Args:
        param: θ, of any shape, in float32, float16 or bfloat16.
        grad: the gradient, of the shape of `param`, in any of the three.
        exp_avg: m, of the shape of `param`, in float32 or bfloat16; zeros before the first step.
        exp_avg_sq: v, likewise.
        step: t, the number of this step, from 1.
        lr: the learning rate, at least 0.
        betas: β₁ and β₂, in [0, 1).
        eps: added to √v̂, at least 0.
        weight_decay: at least 0.
        maximize: step up the gradient instead of down.
        clip: the gradient is multiplied by it as it is read: a number, or a tensor of one element on the device of
            `param`.
        low_bits: int16, of the shape of `param`, which must be bfloat16: the low 16 bits of θ; zeros before the first
            step.
        stochastic: round a bfloat16 `param` stochastically.
        seed: of the random bits, in [0, 2⁶³).

    Returns:
        The new (param, exp_avg, exp_avg_sq), and the new low_bits if they were given; contiguous, of the dtypes given.
        No gradient flows through them.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    check_tensors("adamw", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if low_bits is not None:
        check_tensors("adamw", low_bits=low_bits)
    param, grad, exp_avg, exp_avg_sq = (x.detach() for x in (param, grad, exp_avg, exp_avg_sq))
    check_float("adamw", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, x in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("low_bits", low_bits)):
        check_shape("adamw", name, x, param.shape, "the shape of param")
    same = torch.float64 in (param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype)
    check_same("adamw", "param", param, dtype=same, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_same("adamw", "param", param, dtype=False, low_bits=low_bits)
    for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if x.dtype == torch.float16:
            raise ValueError(f"adamw: {name} has dtype torch.float16, which underflows; it must be float32 or bfloat16")
    if low_bits is not None:
        if param.dtype != torch.bfloat16 or low_bits.dtype != torch.int16:
            raise ValueError(
                f"adamw: low_bits has dtype {low_bits.dtype} and param {param.dtype}; they must be int16 and bfloat16"
            )
        if stochastic:
            raise ValueError("adamw: stochastic is True and low_bits are given; with them nothing is rounded away")
    if stochastic and param.dtype == torch.float16:
        raise ValueError("adamw: stochastic is True and param has dtype torch.float16; it must be bfloat16")
    if not (is_whole(step) and step >= 1):
        raise ValueError(f"adamw: step is {step!r}; it must be at least 1, an integer")
    check_rule("adamw", lr, betas, eps, weight_decay, seed)
    if isinstance(clip, torch.Tensor):
        check_tensors("adamw", clip=clip)
        if clip.numel() != 1 or not clip.is_floating_point():
            raise ValueError(f"adamw: clip has shape {tuple(clip.shape)} and dtype {clip.dtype}; it must be one number")
        check_same("adamw", "param", param, dtype=False, clip=clip)
        clip = clip.detach().reshape(())
    elif clip is not None and not is_number(clip):
        raise ValueError(f"adamw: clip is {clip!r}; it must be a number below 2⁶³ in size, or a tensor")
    if not runs_triton(param):
        return reference(
            param, grad, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            maximize=maximize, clip=clip, low_bits=low_bits, stochastic=stochastic, seed=seed,
        )  # fmt: skip
    scale, clip = (1.0, clip) if clip is None or isinstance(clip, torch.Tensor) else (clip, None)
    results: tuple[torch.Tensor, ...] = _op(
        param, grad, exp_avg, exp_avg_sq, low_bits, clip, step, lr, *betas, eps, weight_decay,
        -scale if maximize else scale, stochastic, seed,
    )  # fmt: skip
    return results if low_bits is not None else results[:3]


def check_rule(op: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
    """Each number of the rule is within its range; infinities and NaN are within none."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (is_number(value) and value >= 0.0):
            raise ValueError(f"{op}: {name} is {value!r}; it must be at least 0 and below 2⁶³")
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{op}: betas is {betas!r}; it must be two numbers, each at least 0 and less than 1")
    if not (is_whole(seed) and seed >= 0):
        raise ValueError(f"{op}: seed is {seed!r}; it must be at least 0 and less than 2⁶³")


def reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    clip: torch.Tensor | float | None = None,
    low_bits: torch.Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
    number: int = 0,
    first: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The same in plain PyTorch; `number` is the tensor's and `first` its first element's, for the random bits."""
    wide = accumulation_dtype(param.dtype)
    beta1, beta2 = betas
    g = grad.to(wide)
    if clip is not None:
        g = g * (clip.to(wide) if isinstance(clip, torch.Tensor) else clip)
    if maximize:
        g = -g
    m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    theta = param.to(wide) if low_bits is None else _joined(param, low_bits)
    denominator = v.sqrt() * (1 - beta2**step) ** -0.5 + eps
    theta = theta - (lr / (1 - beta1**step) * (m / denominator) + lr * weight_decay * theta)
    m = m.to(exp_avg.dtype)
    stochastic = stochastic and param.dtype == torch.bfloat16
    if stochastic or exp_avg_sq.dtype == torch.bfloat16:
        random = _random(seed, number, step, first, param)
    v = _rounded(v, random >> 16) if exp_avg_sq.dtype == torch.bfloat16 else v
    if low_bits is not None:
        high, low = _split(theta)
        return high, m, v, low
    return _rounded(theta, random) if stochastic else theta.to(param.dtype), m, v


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 numbers as int32, one pattern for every NaN: rounding could turn another into a number."""
    return torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))


def _rounded(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 numbers as bfloat16, up where the 16 bits cut off and the low 16 random bits sum to 2¹⁶ or more."""
    return ((_bits(x) + (random & 0xFFFF).int()) >> 16).to(torch.int16).view(torch.bfloat16)


def _joined(high: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """The float32 numbers whose high half is `high`, a bfloat16 number, and whose low half is `low_bits`."""
    return ((high.contiguous().view(torch.int16).int() << 16) + low_bits.int()).view(torch.float32)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 numbers as the nearest bfloat16 numbers and the signed rest: see `_joined`."""
    bits = _bits(x)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def _random(seed: int, number: int, step: int, first: int, like: torch.Tensor) -> torch.Tensor:
    """32 random bits (in int64) for each element of `like`: Philox makes them for four elements at once."""
    numel = like.numel()
    group = torch.arange(first // 4, -(-(first + numel) // 4), device=like.device)
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = group & low, group >> 32, torch.full_like(group, number), torch.full_like(group, step)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        # A product of two 32-bit numbers passes 2⁶³ and wraps; its bits are right, and so are both halves.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten()[first % 4 :][:numel].view(like.shape)


# One program, one block: 16 elements a thread of up to five tensors are enough loads in flight. Where loads are of one
# element, so are the random bits made, four times over, in registers that 16 elements would exhaust.
_WIDE_LOADS = LaunchTable(
    "adamw wide loads",
    {80: (Configuration(1 << 62, 4, {"BLOCK": 2048}),)},
    (Configuration(1 << 62, 4, {"BLOCK": 1024}), Configuration(1 << 62, 8, {"BLOCK": 2048})),
)
_NARROW_LOADS = LaunchTable(
    "adamw narrow loads",
    {80: (Configuration(1 << 62, 4, {"BLOCK": 1024}),)},
    (Configuration(1 << 62, 4, {"BLOCK": 512}), Configuration(1 << 62, 8, {"BLOCK": 1024})),
)
_ADVANCED_A_PROGRAM = 128


class Slot(NamedTuple):
    """One parameter and its state: each one run of memory, all of one length and order.

    Attributes:
        step: the steps done, a float32 number.
        number: the tensor's, for the random bits.
        first: its first element's, for the random bits; not 0 where it is a shard of a tensor.
    """

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    low_bits: torch.Tensor | None
    step: torch.Tensor
    number: int = 0
    first: int = 0

    def tensors(self) -> list[torch.Tensor | None]:
        """In the order of the pointer table."""
        return [self.param, self.exp_avg, self.exp_avg_sq, self.low_bits]


class Rule(NamedTuple):
    """The numbers of one step; `scale` multiplies the gradient, −1 to maximize."""

    lr: float | torch.Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float = 1.0
    stochastic: bool = False
    seed: int = 0


if HAS_TRITON:
    # The columns of the table of tensors, one row a tensor. The results' pointers are the inputs' where a step is in
    # place; a pointer that is not needed is 0.
    _PARAM, _EXP_AVG, _EXP_AVG_SQ, _LOW_BITS = (tl.constexpr(column) for column in range(4))
    _NEW_PARAM, _NEW_EXP_AVG, _NEW_EXP_AVG_SQ, _NEW_LOW_BITS = (tl.constexpr(column) for column in range(4, 8))
    _STEP, _NUMEL, _NUMBER, _FIRST = (tl.constexpr(column) for column in range(8, 12))
    _COLUMNS = tl.constexpr(12)

    # A bfloat16 number travels as the int16 of its bits: the rounding is done here, and alike in the interpreter.
    _KERNEL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}

    @triton.jit
    def _advance(
        table_ptr,
        factors_ptr,
        lr_ptr,
        found_inf_ptr,
        tensors,
        lr,
        log_beta1,
        log_beta2,
        weight_decay,
        BLOCK: tl.constexpr,
    ):
        """Count the step of every tensor, and work out the factors that its elements share."""
        tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = tensor < tensors  # [BLOCK]
        pointer = tl.load(table_ptr + tensor.to(tl.int64) * _COLUMNS + _STEP, mask=mask, other=0)
        step_ptr = pointer.to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0)
        if found_inf_ptr is not None:
            step += tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, 1.0, 0.0)
        else:
            step += 1.0
        tl.store(step_ptr, step, mask=mask)
        if lr_ptr is not None:
            lr = tl.load(lr_ptr).to(tl.float32)
        # float64: in float32 1 − βᵗ would lose four digits at the first step. A step that is skipped before any was
        # made has no factors; those of the first stand in for them.
        exponent = tl.maximum(step, 1.0).to(tl.float64)
        correction1 = 1.0 - tl.exp(exponent * log_beta1)
        correction2 = 1.0 - tl.exp(exponent * log_beta2)
        tl.store(factors_ptr + 3 * tensor, (lr / correction1).to(tl.float32), mask=mask)
        tl.store(factors_ptr + 3 * tensor + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
        tl.store(factors_ptr + 3 * tensor + 2, lr * weight_decay, mask=mask)

    @triton.jit
    def _pointer(row, column, DTYPE: tl.constexpr, VECTORS: tl.constexpr):
        """The pointer to numbers of `DTYPE` that stands in a column of a table's row."""
        pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
        if VECTORS:
            pointer = tl.multiple_of(pointer, 16)
        return pointer

    @triton.jit
    def _wide(x):
        """Numbers of any kernel dtype as float32."""
        if x.dtype.is_int():
            x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        return x.to(tl.float32)

    @triton.jit
    def _number_bits(x):
        """The bits of float32 numbers, one pattern for every NaN: rounding could turn another into a number."""
        return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)

    @triton.jit
    def _narrow(x, random, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
        """float32 numbers as `DTYPE`: to nearest, or, of bfloat16, up where the part cut off and `random` reach 2¹⁶."""
        if DTYPE.is_int():
            bits = _number_bits(x)
            if STOCHASTIC:
                bits += random
            else:  # ties to even
                bits += 0x7FFF + ((bits >> 16) & 1)
            x = bits >> 16
        return x.to(DTYPE)

    @triton.jit
    def _random_bits(seed, number, step, start, BLOCK: tl.constexpr, VECTORS: tl.constexpr):
        """32 random bits for each of the elements `start`, `start` + 1, …; Philox makes them for four at once."""
        if VECTORS:  # start is a multiple of 4
            group = start // 4 + tl.arange(0, BLOCK // 4)  # [BLOCK / 4], int64
        else:  # made four times over
            element = start + tl.arange(0, BLOCK)
            group = element // 4  # [BLOCK], int64
        a, b, c, d = tl.philox(
            seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), number.to(tl.uint32), step.to(tl.uint32)
        )
        if VECTORS:
            random = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK)
        else:
            lane = element % 4
            random = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
        return random

    # A seed that happens to be 1 or a multiple of 16 is no reason to compile again.
    @triton.jit(do_not_specialize=["seed"])
    def _update(
        table_ptr,
        gradients_ptr,
        blocks_ptr,
        factors_ptr,
        clip_ptr,
        grad_scale_ptr,
        found_inf_ptr,
        scale,
        one_minus_beta1,
        one_minus_beta2,
        eps,
        seed,
        PARAM: tl.constexpr,
        GRADIENT: tl.constexpr,
        EXP_AVG: tl.constexpr,
        EXP_AVG_SQ: tl.constexpr,
        LOW_BITS: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        VECTORS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One block of one tensor: gradient, parameter and state read once, parameter and state written once."""
        program = tl.program_id(0)
        tensor = tl.load(blocks_ptr + 2 * program)
        start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK  # int64: past 2³¹ elements
        row = table_ptr + tensor.to(tl.int64) * _COLUMNS
        numel = tl.load(row + _NUMEL)
        if found_inf_ptr is not None:  # then nothing is read or written
            numel = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, numel, 0)
        if VECTORS:
            numel = tl.multiple_of(numel, 8)
        if clip_ptr is not None:
            scale *= tl.load(clip_ptr).to(tl.float32)
        if grad_scale_ptr is not None:
            scale /= tl.load(grad_scale_ptr).to(tl.float32)
        step_size = tl.load(factors_ptr + 3 * tensor)
        correction = tl.load(factors_ptr + 3 * tensor + 1)
        decay = tl.load(factors_ptr + 3 * tensor + 2)

        element = start + tl.arange(0, BLOCK)
        mask = element < numel  # [BLOCK]
        g = _wide(tl.load(_pointer(gradients_ptr, tensor, GRADIENT, VECTORS) + element, mask=mask, other=0))
        theta = tl.load(_pointer(row, _PARAM, PARAM, VECTORS) + element, mask=mask, other=0)
        m = _wide(tl.load(_pointer(row, _EXP_AVG, EXP_AVG, VECTORS) + element, mask=mask, other=0))
        v = _wide(tl.load(_pointer(row, _EXP_AVG_SQ, EXP_AVG_SQ, VECTORS) + element, mask=mask, other=0))
        if LOW_BITS:
            low = tl.load(_pointer(row, _LOW_BITS, tl.int16, VECTORS) + element, mask=mask, other=0)
            theta = ((theta.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
        else:
            theta = _wide(theta)

        g *= scale
        m += one_minus_beta1 * (g - m)
        v += one_minus_beta2 * (g * g - v)
        theta -= step_size * (m / (tl.sqrt(v) * correction + eps)) + decay * theta

        random = 0
        if STOCHASTIC or EXP_AVG_SQ.is_int():
            step = tl.load(_pointer(row, _STEP, tl.float32, False))
            first = tl.load(row + _FIRST)
            random = _random_bits(seed, tl.load(row + _NUMBER), step, first + start, BLOCK, VECTORS)
            random = random.to(tl.int32, bitcast=True)
        if LOW_BITS:
            bits = _number_bits(theta)
            high = (bits + 0x8000) >> 16  # to nearest, ties away from zero
            low = (bits - (high << 16)).to(tl.int16)
            tl.store(_pointer(row, _NEW_PARAM, PARAM, VECTORS) + element, high.to(tl.int16), mask=mask)
            tl.store(_pointer(row, _NEW_LOW_BITS, tl.int16, VECTORS) + element, low, mask=mask)
        else:
            theta = _narrow(theta, random & 0xFFFF, PARAM, STOCHASTIC)
            tl.store(_pointer(row, _NEW_PARAM, PARAM, VECTORS) + element, theta, mask=mask)
        m = _narrow(m, 0, EXP_AVG, False)
        tl.store(_pointer(row, _NEW_EXP_AVG, EXP_AVG, VECTORS) + element, m, mask=mask)
        v = _narrow(v, (random >> 16) & 0xFFFF, EXP_AVG_SQ, True)
        tl.store(_pointer(row, _NEW_EXP_AVG_SQ, EXP_AVG_SQ, VECTORS) + element, v, mask=mask)


class _Kind(NamedTuple):
    """What the compiler must know of a tensor: tensors that agree in it share a launch."""

    param: torch.dtype
    gradient: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    low_bits: bool
    vectors: bool


class MultiTensor:
    """One step of many parameters of one device, in place: one small launch, and one for each kind of tensor.

    Holds while the slots keep their memory and the gradients their dtypes and alignment (`aligned`).

    Args:
        slots: the parameters and their state.
        grads: a gradient for each, in the same order of memory.
        results: where the results go, if not in place.
    """

    def __init__(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], results: Sequence[Slot] | None = None
    ) -> None:
        self.slots = slots  # keeps the memory alive that the table points to
        self.device = slots[0].param.device
        rows: list[list[int]] = []
        members: dict[_Kind, list[int]] = {}
        for number, (slot, grad, result) in enumerate(zip(slots, grads, results or slots, strict=True)):
            pointers = [x.data_ptr() if x is not None else 0 for x in (*slot.tensors(), *result.tensors())]
            rows.append([*pointers, slot.step.data_ptr(), slot.param.numel(), slot.number, slot.first])
            vectors = all(pointer % 16 == 0 for pointer in pointers) and aligned(grad)
            # Eight elements of 16 bits are 16 bytes; four elements share random bits.
            vectors = vectors and slot.param.numel() % 8 == 0 and slot.first % 4 == 0
            dtypes = (slot.param.dtype, grad.dtype, slot.exp_avg.dtype, slot.exp_avg_sq.dtype)
            members.setdefault(_Kind(*dtypes, slot.low_bits is not None, vectors), []).append(number)
        self.table = _sent(torch.tensor(rows), self.device)
        self.factors = torch.empty(len(rows), 3, dtype=torch.float32, device=self.device)
        self.launches: list[tuple[_Kind, Configuration, torch.Tensor]] = []
        for kind, numbers in members.items():
            elements = [slots[number].param.numel() for number in numbers]
            configuration = (_WIDE_LOADS if kind.vectors else _NARROW_LOADS).pick(max(elements), self.device)
            blocks = _blocks(numbers, elements, configuration.blocks["BLOCK"])
            if len(blocks):  # not all empty
                self.launches.append((kind, configuration, _sent(blocks, self.device)))
        self._sent_pointers: list[int] = []
        self._gradients = self.table

    def __call__(
        self,
        grads: Sequence[torch.Tensor],
        rule: Rule,
        *,
        clip: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Make the step.

        Args:
            grads: as many as slots, of the dtypes and alignment of those given at first.
            rule: the numbers; a tensor `lr` on the device.
            clip: the gradients are multiplied by it: a tensor of one element on the device, like the next two.
            grad_scale: the gradients are divided by it.
            found_inf: the step is skipped unless it is 0.
        """
        pointers = [grad.data_ptr() for grad in grads]
        if pointers != self._sent_pointers:
            self._sent_pointers, self._gradients = pointers, _sent(torch.tensor(pointers), self.device)
        # float: a whole number would have the kernel compiled again for its type.
        lr, lr_ptr = (0.0, rule.lr) if isinstance(rule.lr, torch.Tensor) else (float(rule.lr), None)
        tensors = len(self.slots)
        _advance[(triton.cdiv(tensors, _ADVANCED_A_PROGRAM),)](
            self.table, self.factors, lr_ptr, found_inf, tensors, lr, _log(rule.beta1), _log(rule.beta2),
            float(rule.weight_decay), BLOCK=_ADVANCED_A_PROGRAM,
        )  # fmt: skip
        for kind, configuration, blocks in self.launches:
            _update[(len(blocks),)](
                self.table, self._gradients, blocks, self.factors, clip, grad_scale, found_inf,
                float(rule.scale), 1.0 - rule.beta1, 1.0 - rule.beta2, float(rule.eps), rule.seed,
                PARAM=_KERNEL_DTYPES[kind.param],
                GRADIENT=_KERNEL_DTYPES[kind.gradient],
                EXP_AVG=_KERNEL_DTYPES[kind.exp_avg],
                EXP_AVG_SQ=_KERNEL_DTYPES[kind.exp_avg_sq],
                LOW_BITS=kind.low_bits,
                STOCHASTIC=rule.stochastic and kind.param == torch.bfloat16,
                VECTORS=kind.vectors,
                num_warps=configuration.num_warps,
                **configuration.blocks,
            )  # fmt: skip


def _blocks(numbers: list[int], elements: list[int], size: int) -> torch.Tensor:
    """(programs, 2) int32: the tensor of each program, and which of its blocks of `size` elements."""
    counts = -(-torch.tensor(elements) // size)
    before = counts.cumsum(0) - counts
    tensor = torch.tensor(numbers).repeat_interleave(counts)
    block = torch.arange(len(tensor)) - before.repeat_interleave(counts)
    return torch.stack((tensor, block), dim=1).int()


def aligned(x: torch.Tensor) -> bool:
    """Whether the memory of `x` starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0


def _sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`, without waiting for what the device is still doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _log(beta: float) -> float:
    """log β, of 0 a number whose multiples have the exponential 0."""
    return math.log(beta) if beta > 0 else -1e4


def _launch(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    low_bits: torch.Tensor | None,
    clip: torch.Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    stochastic: bool,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    done = torch.full((), step - 1.0, dtype=torch.float32, device=param.device)
    param, exp_avg, exp_avg_sq, grad = (x.contiguous() for x in (param, exp_avg, exp_avg_sq, grad))
    low_bits = low_bits.contiguous() if low_bits is not None else None
    new_low_bits = torch.empty_like(low_bits) if low_bits is not None else None
    slot = Slot(param, exp_avg, exp_avg_sq, low_bits, done)
    new = Slot(torch.empty_like(param), torch.empty_like(exp_avg), torch.empty_like(exp_avg_sq), new_low_bits, done)
    rule = Rule(lr, beta1, beta2, eps, weight_decay, scale, stochastic, seed)
    MultiTensor([slot], [grad], [new])([grad], rule, clip=clip)
    absent = param.new_empty(0, dtype=torch.int16)
    return new.param, new.exp_avg, new.exp_avg_sq, new_low_bits if new_low_bits is not None else absent


def _fake(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    low_bits: torch.Tensor | None,
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = param.shape
    new = [x.new_empty(shape) for x in (param, exp_avg, exp_avg_sq)]
    return new[0], new[1], new[2], param.new_empty(shape if low_bits is not None else 0, dtype=torch.int16)


_op = register(
    "adamw(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor? low_bits, Tensor? clip, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float scale, bool stochastic, int seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    state = frozenset({"exp_avg", "exp_avg_sq", "clip"})  # float16 would underflow

    def sample(label: str, *shape: int, coefficient: float | None = None, **options: object) -> Sample:
        tensors: dict[str, torch.Tensor] = {
            "param": torch.randn(shape, device=device).to(dtype),
            "grad": torch.randn(shape, device=device).to(dtype),
            "exp_avg": torch.randn(shape, device=device) / 10,
            "exp_avg_sq": torch.rand(shape, device=device) / 100,
        }
        if coefficient is not None:
            tensors["clip"] = torch.tensor(coefficient, device=device)
        return Sample(label, tensors, {"step": 7, **options}, state)

    for numel in (1, 7, 127, 1000, 4097):
        yield sample(f"{numel}", numel, lr=0.1)
    yield sample("first step", 3, 40, step=1, lr=0.01, weight_decay=0.0)
    yield sample("step of a million", 64, step=1_000_000, lr=0.1)
    yield sample("clipped by a tensor", 8, 24, coefficient=0.3, lr=0.1)
    yield sample("clipped by a number, maximized", 8, 24, clip=0.3, lr=0.1, maximize=True)
    yield sample("no momentum", 40, betas=(0.0, 0.0), lr=0.1, eps=1e-3)
    yield sample("no dimension", lr=0.1)
    yield sample("three rows", 3, 40, lr=0.1)
    yield sample("no rows", 0, 40)
    transposed = sample("transposed", 12, 30, lr=0.1, weight_decay=0.1)
    yield Sample(transposed.label, {name: x.t() for name, x in transposed.tensors.items()}, transposed.options, state)
    apart = sample("row stride, expanded gradient", 9, 60, lr=0.1)
    tensors = {name: x[:, :33] for name, x in apart.tensors.items()}
    yield Sample(apart.label, {**tensors, "grad": tensors["grad"][:1].expand(9, 33)}, apart.options, state)


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    rows = 16 if small else 4096

    def sample(label: str, param: torch.dtype, state: torch.dtype, **options: object) -> Sample:
        shapes = {"param": param, "grad": param, "exp_avg": state, "exp_avg_sq": state}
        tensors = {name: torch.empty(rows, 4096, dtype=kind) for name, kind in shapes.items()}
        return Sample(label, tensors, {"step": 7, **options})

    yield sample("float32", torch.float32, torch.float32)
    yield sample("float32, bfloat16 state", torch.float32, torch.bfloat16)
    yield sample(f"{dtype}"[6:], dtype, torch.float32)
    if dtype == torch.bfloat16:
        yield sample("bfloat16, stochastic", dtype, torch.float32, stochastic=True)
        yield sample("bfloat16, bfloat16 state, stochastic", dtype, torch.bfloat16, stochastic=True)
        kept = sample("bfloat16, low bits", dtype, torch.float32)
        tensors = {**kept.tensors, "low_bits": torch.empty(rows, 4096, dtype=torch.int16)}
        yield Sample(kept.label, tensors, kept.options)
        # One element more than a whole number of vectors.
        odd = {name: torch.empty(4097, dtype=dtype) for name in ("param", "grad")}
        odd |= {name: torch.empty(4097, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        yield Sample("bfloat16, stochastic, odd", odd, {"step": 7, "stochastic": True})


def _work(sample: Sample) -> Passes:
    """Parameter and state in and out, the gradient in."""
    moved = 2 * sample.nbytes("param", "exp_avg", "exp_avg_sq", "low_bits") + sample.nbytes("grad", "clip")
    # Per element: 3 for m, 4 for v, 5 for the update with its root and quotient, 3 for the decay and the sum.
    return Passes(Work(15 * sample.tensors["param"].numel(), moved))


SPEC = OpSpec(
    name="adamw",
    function=adamw,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    tables={"wide loads": _WIDE_LOADS, "narrow loads": _NARROW_LOADS},
    # Each tensor is one run of memory; that elements past 2³¹ are found is tested with the tables themselves.
    strided=(),
    no_gradient=frozenset({"param", "grad", "exp_avg", "exp_avg_sq", "clip"}),
)
