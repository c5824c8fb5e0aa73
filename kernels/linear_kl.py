"""How far a student's distribution over classes is from a teacher's, from the hidden states and heads of both, without
ever holding all the logits: the loss of knowledge distillation (Hinton et al. 2015, arXiv:1503.02531).

With T the temperature, the student's logits s = (hidden · weightᵀ + bias) / T and the teacher's t likewise,
q = softmax(s), p = softmax(t) and a = log p − log q, a row's loss is T² times

    forward          KL(p ‖ q) = Σ_j p_j a_j                            covers all that the teacher may say
    reverse          KL(q ‖ p) = −Σ_j q_j a_j                           says nothing that the teacher would not
    jensen-shannon   ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = (p + q) / 2       between the two, at most log 2

The factor T² keeps the gradient's size when T changes. Backward, for an upstream gradient g of a row's loss, and ℓ the
student's logits before the division by T:

    forward          dℓ_j = g · T · (q_j − p_j)
    reverse          dℓ_j = g · T · q_j (−a_j − KL(q ‖ p))
    jensen-shannon   dℓ_j = g · T · ½ q_j (log(q_j / m_j) − KL(q ‖ m))

log(q / m) = log 2 − softplus(a) and log(p / m) = log 2 − softplus(−a), which do not cancel where p and q are close.

Shapes: hidden (…, width), weight (classes, width), bias (classes,); the teacher's likewise, its width its own. The
matrix products run in the inputs' dtype, all else in float32 (float64 for float64 inputs), the losses too. The kernel
reads both rows of logits twice, for Jensen-Shannon three times, and writes the gradient over the student's. See
`linear_chunks` for the chunks. The teacher takes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_same, check_shape, check_tensors, is_number
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.linear_chunks import Gradients, HeadLoss, Wanted, chunk_rows, head_inputs, in_chunks, mean
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import accumulation_dtype

if HAS_TRITON:
    import triton
    import triton.language as tl

DIVERGENCES = ("forward", "reverse", "jensen-shannon")
REDUCTIONS = ("mean", "sum", "none")


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The divergence of a student's head from a teacher's, in bounded memory.

    Args:
        hidden: (…, width).
        weight: (classes, width), of the dtype of `hidden`; or a parameter that ``fully_shard`` has sharded.
        teacher_hidden: (…, teacher width): the same rows, of the teacher's width and dtype.
        teacher_weight: (classes, teacher width).
        bias, teacher_bias: (classes,).
        temperature: T, which both logits are divided by; the loss is multiplied by T².
        divergence: ``"forward"``, ``"reverse"`` or ``"jensen-shannon"``.
        mask: (…) bool, False where a row counts for nothing, such as ``targets != -100``; None counts all.
        reduction: ``"mean"`` over the rows that count, which ``torch.nn.functional.kl_div`` calls "batchmean";
            ``"sum"`` or ``"none"``.

    Returns:
        float32 (float64 for float64 hidden): a scalar, or (…) for ``"none"``, in nats. Gradients go to `hidden`,
        `weight` and `bias`, never to the teacher.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    op = "linear_kl"
    _check_options(temperature, divergence, reduction)
    hidden, weight, bias = head_inputs(op, hidden, weight, bias)
    teacher = _detached(teacher_hidden), _detached(teacher_weight), _detached(teacher_bias)
    teacher = head_inputs(op, *teacher, "teacher_")
    teacher_hidden, teacher_weight, teacher_bias = teacher
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, mask)

    shape = hidden.shape[:-1]
    flat, flat_teacher = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    counts = mask.reshape(-1) if mask is not None else None
    inputs = (flat, weight, bias, flat_teacher, teacher_weight, teacher_bias, counts, temperature, divergence)
    if reduction == "none":
        losses: torch.Tensor = _LOSS.rows(*inputs)[0]
        return losses.view(shape)
    total: torch.Tensor = _LOSS.total(*inputs)[0]
    if reduction == "sum":
        return total
    return mean(total, counts.sum() if counts is not None else torch.full((), flat.shape[0], device=total.device))


def _check_options(temperature: float, divergence: str, reduction: str) -> None:
    if not (is_number(temperature) and temperature > 0.0):
        raise ValueError(f"linear_kl: temperature is {temperature!r}; it must be finite and more than 0, and below 2⁶³")
    if divergence not in DIVERGENCES:
        raise ValueError(f"linear_kl: divergence is {divergence!r}; it must be one of {', '.join(DIVERGENCES)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_kl: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def _check_teacher(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """The teacher has the student's rows and classes, on its device; so has the mask."""
    op, rows = "linear_kl", hidden.shape[:-1]
    check_shape(
        op,
        "teacher_hidden",
        teacher_hidden,
        (*rows, teacher_hidden.shape[-1]),
        "the rows of hidden and a width of its own",
    )
    check_shape(
        op, "teacher_weight", teacher_weight, (weight.shape[0], teacher_hidden.shape[-1]), "with the classes of weight"
    )
    if mask is not None:
        check_tensors(op, mask=mask)
    check_same(op, "hidden", hidden, dtype=False, teacher_hidden=teacher_hidden, mask=mask)
    check_shape(op, "mask", mask, rows, "one for each row of hidden")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask has dtype {mask.dtype}; it must be bool")


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The same with all the logits at once."""
    wide = accumulation_dtype(hidden.dtype)
    log_q = torch.log_softmax(F.linear(hidden, weight, bias).to(wide) / temperature, -1)
    log_p = torch.log_softmax(F.linear(teacher_hidden, teacher_weight, teacher_bias).to(wide) / temperature, -1)

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)

    if divergence == "forward":
        losses = kl(log_p, log_q)
    elif divergence == "reverse":
        losses = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
        losses = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    losses = losses * temperature**2
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (mask.sum() if mask is not None else losses.numel())


# The columns of both rows that one step reads.
_COLUMNS = LaunchTable(
    "linear_kl columns",
    # With 8 warps and 2,048 columns, rows at odd strides spill a register.
    {80: (Configuration(1 << 31, 4, {"BLOCK_COLUMNS": 1024}),)},
    tuple(Configuration(1 << 31, warps, {"BLOCK_COLUMNS": size}) for warps, size in ((8, 2048), (4, 2048), (8, 4096))),
)


if HAS_TRITON:
    LOG_2 = tl.constexpr(math.log(2.0))

    @triton.jit
    def _softplus(x):
        return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))

    @triton.jit
    def _forward_backward(
        logits_ptr,
        teacher_ptr,
        mask_ptr,
        upstream_ptr,
        losses_ptr,
        logits_stride,
        teacher_stride,
        upstream_stride,
        classes,
        temperature,
        DIVERGENCE: tl.constexpr,  # 0 forward, 1 reverse, 2 Jensen-Shannon
        HAS_MASK: tl.constexpr,
        HAS_GRADIENT: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        teacher_ptr += row * teacher_stride
        counts = row >= 0
        if HAS_MASK:
            counts = tl.load(mask_ptr + row) != 0
        # The logits of a row that does not count are not read.
        readable = tl.where(counts, classes, 0)
        per_temperature = 1.0 / temperature
        minus_infinity = -float("inf")

        # Each lane keeps its own maxima and sums; they meet once, at the end. They start at the lowest number and not
        # at −∞, whose difference from itself is NaN.
        top_s = tl.full([BLOCK_COLUMNS], -3.4028234e38, tl.float32)
        top_t = tl.full([BLOCK_COLUMNS], -3.4028234e38, tl.float32)
        sum_s = tl.zeros([BLOCK_COLUMNS], tl.float32)
        sum_t = tl.zeros([BLOCK_COLUMNS], tl.float32)
        excess = tl.zeros([BLOCK_COLUMNS], tl.float32)  # Σ exp(s − top_s) (s − t)
        for start in range(0, classes, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < readable
            s = tl.load(logits_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
            t = tl.load(teacher_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
            # One of exp(top − new top) and exp(s − new top) is 1.
            smaller_s = tl.exp(-tl.abs(s - top_s))
            smaller_t = tl.exp(-tl.abs(t - top_t))
            higher = s > top_s
            sum_s = tl.where(higher, sum_s * smaller_s + 1.0, sum_s + smaller_s)
            sum_t = tl.where(t > top_t, sum_t * smaller_t + 1.0, sum_t + smaller_t)
            if DIVERGENCE == 1:
                difference = tl.where(s == minus_infinity, 0.0, s - t)
                excess = tl.where(higher, excess * smaller_s + difference, excess + smaller_s * difference)
            top_s = tl.maximum(top_s, s)
            top_t = tl.maximum(top_t, t)
        row_top_s = tl.max(top_s, axis=0)
        row_top_t = tl.max(top_t, axis=0)
        total_s = tl.sum(sum_s * tl.exp(top_s - row_top_s), axis=0)
        total_t = tl.sum(sum_t * tl.exp(top_t - row_top_t), axis=0)
        # The logarithm of the quotient: the difference of two would round to the size of each.
        log_totals = tl.log(total_t / total_s)
        # What the gradient subtracts from each class so that all sum to zero.
        center = 0.0
        if DIVERGENCE == 1:
            mean_excess = tl.sum(excess * tl.exp(top_s - row_top_s), axis=0) / total_s
            center = mean_excess - (row_top_s - row_top_t) + log_totals
        if HAS_GRADIENT:
            scale = temperature * tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)

        loss = tl.zeros([BLOCK_COLUMNS], tl.float32)
        student_loss = tl.zeros([BLOCK_COLUMNS], tl.float32)  # of Jensen-Shannon: Σ q log(q / m)
        for start in range(0, classes, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < readable
            s = tl.load(logits_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
            t = tl.load(teacher_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
            s -= row_top_s
            t -= row_top_t
            q = tl.exp(s) / total_s
            p = tl.exp(t) / total_t
            a = (t - s) - log_totals  # NaN where both are −∞, which takes part in no sum
            if DIVERGENCE == 0:
                loss += tl.where(p > 0.0, p * a, 0.0)
                gradient = q - p
            if DIVERGENCE == 1:
                loss -= tl.where(q > 0.0, q * a, 0.0)
                gradient = tl.where(q > 0.0, q * (-a - center), 0.0)
            if DIVERGENCE == 2:
                loss += tl.where(p > 0.0, p * (LOG_2 - _softplus(-a)), 0.0)
                student_loss += tl.where(q > 0.0, q * (LOG_2 - _softplus(a)), 0.0)
            if HAS_GRADIENT and DIVERGENCE != 2:
                gradient = tl.where(counts, gradient * scale, 0.0)
                # Over the logits themselves, of which this program has read these for the last time.
                tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < classes)
        row_loss = tl.sum(loss, axis=0)
        if DIVERGENCE == 2:
            center = tl.sum(student_loss, axis=0)
            row_loss = 0.5 * (row_loss + center)
        tl.store(losses_ptr + row, tl.where(counts, row_loss * temperature * temperature, 0.0))

        if HAS_GRADIENT and DIVERGENCE == 2:
            for start in range(0, classes, BLOCK_COLUMNS):
                columns = start + tl.arange(0, BLOCK_COLUMNS)
                mask = columns < readable
                s = tl.load(logits_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
                t = tl.load(teacher_ptr + columns, mask=mask, other=minus_infinity).to(tl.float32) * per_temperature
                s -= row_top_s
                t -= row_top_t
                q = tl.exp(s) / total_s
                gradient = 0.5 * q * (LOG_2 - _softplus((t - s) - log_totals) - center)
                gradient = tl.where(counts & (q > 0.0), gradient * scale, 0.0)
                tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < classes)


def _launch_rows_kernel(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None,
    upstream: torch.Tensor | None,
    temperature: float,
    divergence: str,
) -> torch.Tensor:
    """Losses (rows,); given the upstream gradient of each, `logits` become their gradient."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    rows, classes = logits.shape
    configuration = _COLUMNS.pick(classes, logits.device)
    _forward_backward[(rows,)](
        logits,
        teacher_logits,
        mask.contiguous() if mask is not None else losses,
        upstream if upstream is not None else losses,
        losses,
        logits.stride(0),
        teacher_logits.stride(0),
        upstream.stride(0) if upstream is not None else 0,
        classes,
        temperature,
        DIVERGENCE=DIVERGENCES.index(divergence),
        HAS_MASK=mask is not None,
        HAS_GRADIENT=upstream is not None,
        **configuration.blocks,
        num_warps=configuration.num_warps,
    )
    return losses


def _plain_rows(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None,
    upstream: torch.Tensor | None,
    temperature: float,
    divergence: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (rows,) and, given the upstream gradient of each, dlogits (rows, classes), in plain PyTorch."""
    wide = accumulation_dtype(logits.dtype)
    log_q = torch.log_softmax(logits.to(wide) / temperature, -1)
    log_p = torch.log_softmax(teacher_logits.to(wide) / temperature, -1)
    q, p, a = log_q.exp(), log_p.exp(), log_p - log_q
    if divergence == "forward":
        losses = torch.where(p > 0, p * a, 0.0).sum(-1)
        gradient = q - p
    elif divergence == "reverse":
        losses = torch.where(q > 0, -q * a, 0.0).sum(-1)
        gradient = torch.where(q > 0, q * (-a - losses[:, None]), 0.0)
    else:
        log_q_m = math.log(2.0) - F.softplus(a)
        student = torch.where(q > 0, q * log_q_m, 0.0).sum(-1)
        teacher = torch.where(p > 0, p * (math.log(2.0) - F.softplus(-a)), 0.0).sum(-1)
        losses = (student + teacher) / 2
        gradient = torch.where(q > 0, 0.5 * q * (log_q_m - student[:, None]), 0.0)
    counts = mask if mask is not None else torch.ones_like(losses, dtype=torch.bool)
    losses = torch.where(counts, losses * temperature**2, 0.0)
    if upstream is None:
        return losses, None
    gradient = torch.where(counts[:, None], gradient * (temperature * upstream)[:, None], 0.0)
    return losses, gradient.to(logits.dtype)


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    divergence: str,
    upstream: torch.Tensor | None,
    wants: Wanted,
) -> tuple[tuple[torch.Tensor], Gradients]:
    """Losses (rows,), and the gradients that are wanted given the upstream gradient of each row."""
    losses = torch.empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)

    def rows(span: slice, logits: torch.Tensor) -> torch.Tensor | None:
        teacher_logits = F.linear(teacher_hidden[span], teacher_weight, teacher_bias)
        inputs = (
            logits,
            teacher_logits,
            mask[span] if mask is not None else None,
            upstream[span] if upstream is not None else None,
            temperature,
            divergence,
        )
        if runs_triton(logits):
            losses[span] = _launch_rows_kernel(*inputs)
            return logits if upstream is not None else None
        losses[span], dlogits = _plain_rows(*inputs)
        return dlogits

    step = chunk_rows(8 * weight.shape[0], hidden.device)  # the logits of two, and their float32 copies
    return (losses,), in_chunks(hidden, weight, bias, wants, step, rows)


_LOSS = HeadLoss(
    "linear_kl",
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? mask, float temperature, "
    "str divergence",
    _in_chunks,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def heads(rows: int, width: int, teacher_width: int, classes: int) -> dict[str, torch.Tensor]:
        return {
            "hidden": normal(rows, width),
            "weight": normal(classes, width) / width**0.5,
            "teacher_hidden": normal(rows, teacher_width),
            "teacher_weight": normal(classes, teacher_width) / teacher_width**0.5,
        }

    for divergence in DIVERGENCES:
        yield Sample(divergence, heads(4, 8, 24, 33), {"divergence": divergence})
        inputs = heads(7, 8, 16, 1000)
        inputs |= {"bias": normal(1000), "teacher_bias": normal(1000)}
        inputs["mask"] = torch.tensor([True, False, True, True, False, True, True], device=device)
        options = {"divergence": divergence, "temperature": 2.5, "reduction": "none"}
        yield Sample(f"{divergence}, all options", inputs, options)
        # Differences of two nearly equal distributions.
        close = heads(3, 16, 16, 127)
        close["teacher_hidden"] = close["hidden"] + 0.01 * normal(3, 16)
        close["teacher_weight"] = close["weight"].clone()
        yield Sample(f"{divergence}, close to the teacher", close, {"divergence": divergence, "reduction": "sum"})
    yield Sample("three rows", heads(3, 8, 16, 50), {"divergence": "jensen-shannon", "reduction": "sum"})
    yield Sample("no rows", heads(0, 8, 16, 50), {"reduction": "sum"})
    yield Sample("one class", heads(2, 8, 4, 1))
    yield Sample("4097 classes", heads(1, 4, 4, 4097), {"temperature": 0.5})
    batched = heads(6, 16, 8, 40)
    batched["hidden"] = batched["hidden"].view(2, 3, 16)
    batched["teacher_hidden"] = batched["teacher_hidden"].view(2, 3, 8)
    yield Sample("batched", batched, {"reduction": "none"})
    transposed = heads(4, 8, 16, 30)
    transposed["teacher_hidden"] = normal(16, 4).t()
    yield Sample("transposed and expanded", transposed | {"hidden": normal(1, 8).expand(4, 8)})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    # The matrix products are PyTorch's; the kernels see chunks of logits, of which the number of classes matters.
    for name, classes in {"125M": 50257, "8B": 128256, "262,144 classes": 262144}.items():
        for divergence in DIVERGENCES:
            hidden, weight = torch.zeros(128, 16, dtype=dtype), torch.zeros(classes, 16, dtype=dtype)
            tensors = {"hidden": hidden, "weight": weight, "teacher_hidden": hidden, "teacher_weight": weight}
            yield Sample(f"{name}, {divergence}", tensors, {"divergence": divergence})


def _work(sample: Sample) -> Passes:
    """A matrix product of the student and one of the teacher forward, two of the student backward."""
    classes = sample.tensors["weight"].shape[0]
    products = 2 * classes * sample.tensors["hidden"].numel()
    teachers = 2 * classes * sample.tensors["teacher_hidden"].numel()
    inputs = sample.nbytes(*sample.tensors)
    return Passes(
        Work(products + teachers, inputs + 4),
        Work(2 * products + teachers, inputs + sample.nbytes("hidden", "weight", "bias")),
        common=Work(teachers, inputs),
    )


SPEC = OpSpec(
    name="linear_kl",
    function=linear_kl,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("hidden", "teacher_hidden"),
    tables={"columns": _COLUMNS},
    no_gradient=frozenset({"teacher_hidden", "teacher_weight", "teacher_bias"}),
)
