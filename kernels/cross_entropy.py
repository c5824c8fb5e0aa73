"""Cross-entropy of each row of logits against a target class, without a second copy of the logits.

With z = softcap · tanh(logits / softcap), or z = logits without a softcap, t the target, V the classes and ε the label
smoothing:

    lse = log Σ_j exp(z_j)
    loss = lse − (1 − ε) z_t − (ε / V) Σ_j z_j + z_loss · lse²        (z-loss: PaLM, arXiv:2204.02311)

Backward, for an upstream gradient g of a row's loss, with p_j = exp(z_j − lse):

    dlogits_j = g · (p_j (1 + 2 · z_loss · lse) − (1 − ε) [j = t] − ε / V) · (1 − (z_j / softcap)²)

Shapes: logits (…, classes), targets (…). Rows whose target is `ignore_index` have loss 0 and gradient 0. All
arithmetic is float32 (float64 for float64 logits), the losses too: a loss rounded to bfloat16 has two significant
digits. The forward pass reads the logits once and keeps lse as two numbers, the row's maximum and the log-sum-exp
relative to it: their sum would round away what tells a sure prediction from a certain one. The backward pass reads the
logits once more and writes the gradient to new memory, never over the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import accumulation_dtype, as_rows

if HAS_TRITON:
    import triton
    import triton.language as tl

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> torch.Tensor:
    """Cross-entropy along the last dimension, as ``torch.nn.functional.cross_entropy`` for (rows, classes).

    Args:
        logits: (…, classes).
        targets: (…) int64, classes or `ignore_index`.
        ignore_index: rows with this target count for nothing.
        label_smoothing: ε in [0, 1], spread evenly over all classes.
        z_loss: weight of the squared log-sum-exp.
        softcap: bounds the logits to ±softcap; None leaves them.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.
        group: not supported yet; must be None.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (…) for ``"none"``.

    Raises:
        ValueError: an argument does not fit; on CPU also a target that is no class. On a GPU, where looking would wait
            for the device, such a row's loss is NaN.
    """
    check_float("cross_entropy", logits=logits)
    check_loss_options("cross_entropy", label_smoothing, z_loss, softcap, reduction, group)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits has no dimension; it must be (…, classes)")
    check_targets("cross_entropy", targets, logits, "logits", logits.shape[-1], ignore_index)
    if not runs_triton(logits):
        return reference(
            logits,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )
    losses, _ = forward_op(logits, targets, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    return reduce_losses(losses, targets, ignore_index, reduction)


def check_loss_options(
    op: str, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, group: Any
) -> None:
    """Raise ``ValueError`` for an option of the loss that is out of its range."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss is {z_loss}; it must be 0 or more")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"{op}: softcap is {softcap}; it must be more than 0, or None")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    if group is not None:
        raise ValueError(f"{op}: group is not supported yet; it must be None")


def check_targets(
    op: str, targets: torch.Tensor, rows: torch.Tensor, rows_name: str, classes: int, ignore_index: int
) -> None:
    """Raise ``ValueError`` unless `targets` are int64, one for each row of `rows`, and, on CPU, classes."""
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets has dtype {targets.dtype}; it must be int64")
    if targets.shape != rows.shape[:-1]:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)}; it must be {tuple(rows.shape[:-1])}, "
            f"one for each row of {rows_name}"
        )
    check_same(op, rows_name, rows, dtype=False, targets=targets)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            raise ValueError(
                f"{op}: targets holds {int(wrong[0])}; each must be a class from 0 to {classes - 1}, "
                f"or ignore_index ({ignore_index})"
            )


def reduce_losses(losses: torch.Tensor, targets: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """The rows' losses reduced; the mean is over the rows that count, and NaN where none does, as in PyTorch."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """The same in plain PyTorch."""
    z = logits.to(accumulation_dtype(logits.dtype)).reshape(-1, logits.shape[-1])
    flat = targets.reshape(-1)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        losses = losses + torch.where(flat == ignore_index, 0.0, z_loss * z.logsumexp(-1).square())
    return reduce_losses(losses.view(targets.shape), targets, ignore_index, reduction)


# The columns of a row that one step reads.
_COLUMNS = LaunchTable(
    {
        80: (
            Configuration(1024, 4, {"BLOCK_COLUMNS": 1024}),
            Configuration(1 << 31, 8, {"BLOCK_COLUMNS": 4096}),
        )
    }
)


if HAS_TRITON:

    @triton.jit
    def _softcapped(x, softcap, HAS_SOFTCAP: tl.constexpr):
        if HAS_SOFTCAP:
            # tanh(a) = 1 − 2 / (exp(2a) + 1), which saturates rightly where exp overflows.
            x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
        return x

    @triton.jit
    def _forward(
        logits_ptr,
        targets_ptr,
        losses_ptr,
        statistics_ptr,
        logits_stride,
        classes,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        HAS_SMOOTHING: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        target = tl.load(targets_ptr + row)
        # Each lane keeps its own maximum and sum; they meet once, at the end.
        top = tl.full([BLOCK_COLUMNS], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_COLUMNS], tl.float32)
        sum_z = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, classes, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < classes
            z = tl.load(logits_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
            z = _softcapped(z, softcap, HAS_SOFTCAP)
            z = tl.where(mask, z, -float("inf"))
            new_top = tl.maximum(top, z)
            finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - finite_top) + tl.exp(z - finite_top)
            top = new_top
            if HAS_SMOOTHING:
                sum_z += tl.where(mask, z, 0.0)
        row_top = tl.max(top, axis=0)
        log_sum = tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
        lse = row_top + log_sum
        counts = target != ignore_index
        is_class = (target >= 0) & (target < classes)
        # A target that is no class makes the loss NaN: wrong data must not look like a number.
        z_target = tl.load(logits_ptr + target, mask=is_class, other=float("nan")).to(tl.float32)
        z_target = _softcapped(z_target, softcap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            z_target = (1.0 - label_smoothing) * z_target + label_smoothing * (tl.sum(sum_z, axis=0) / classes)
        # Not lse − z_target: where the model is sure, both are large and their difference would be rounding alone.
        loss = log_sum - (z_target - row_top) + z_loss * lse * lse
        tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
        tl.store(statistics_ptr + 2 * row, row_top)
        tl.store(statistics_ptr + 2 * row + 1, log_sum)

    @triton.jit
    def _backward(
        upstream_ptr,
        logits_ptr,
        targets_ptr,
        statistics_ptr,
        dlogits_ptr,
        upstream_stride,
        logits_stride,
        dlogits_stride,
        classes,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        row_top = tl.load(statistics_ptr + 2 * row)
        log_sum = tl.load(statistics_ptr + 2 * row + 1)
        lse = row_top + log_sum
        upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        counts = target != ignore_index
        for start in range(0, classes, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < classes
            z = tl.load(logits_ptr + row * logits_stride + columns, mask=mask, other=0.0).to(tl.float32)
            z = _softcapped(z, softcap, HAS_SOFTCAP)
            dz = tl.exp((z - row_top) - log_sum) * (1.0 + 2.0 * z_loss * lse) - label_smoothing / classes
            # Subtracted in float32, before any rounding: p and 1 nearly cancel where the model is sure.
            dz -= tl.where(columns == target, 1.0 - label_smoothing, 0.0)
            if HAS_SOFTCAP:
                dz *= 1.0 - (z / softcap) * (z / softcap)
            dz = tl.where(counts, dz * upstream, 0.0)
            tl.store(dlogits_ptr + row * dlogits_stride + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _column_constants(classes: int, softcap: float, device: torch.device) -> dict[str, Any]:
    configuration = _COLUMNS.pick(classes, device)
    return {"HAS_SOFTCAP": softcap > 0.0, **configuration.blocks, "num_warps": configuration.num_warps}


def _launch_forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # A softcap of 0 stands for none.
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((targets.numel(), 2), dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return losses, statistics
    rows = as_rows(logits)
    options = (rows.stride(0), rows.shape[1], ignore_index, label_smoothing, z_loss, softcap)
    constants = {"HAS_SMOOTHING": label_smoothing > 0.0, **_column_constants(rows.shape[1], softcap, logits.device)}
    _forward[(rows.shape[0],)](rows, targets.contiguous(), losses, statistics, *options, **constants)
    return losses, statistics


def _launch_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return dlogits
    rows, upstream = as_rows(logits), upstream.reshape(-1)
    constants = _column_constants(rows.shape[1], softcap, logits.device)
    strides = (upstream.stride(0), rows.stride(0), rows.shape[1])
    options = (rows.shape[1], ignore_index, label_smoothing, z_loss, softcap)
    _backward[(rows.shape[0],)](
        upstream, rows, targets.contiguous(), statistics, dlogits, *strides, *options, **constants
    )
    return dlogits


# `linear_cross_entropy` runs these two on its chunks of logits.
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
forward_op = register(
    f"cross_entropy(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_forward,
    lambda logits, targets, *_: (
        logits.new_empty(targets.shape, dtype=torch.float32),
        logits.new_empty((targets.numel(), 2), dtype=torch.float32),
    ),
)
backward_op = register(
    f"cross_entropy_backward(Tensor upstream, Tensor logits, Tensor targets, Tensor statistics, {_OPTIONS}) -> Tensor",
    _launch_backward,
    lambda upstream, logits, *_: logits.new_empty(logits.shape),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _gradients(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return backward_op(upstream, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


differentiate(forward_op, _gradients, _setup_context)
refuse_double_backward(backward_op)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def rows(count: int, classes: int) -> dict[str, torch.Tensor]:
        logits = (3 * torch.randn(count, classes, device=device)).to(dtype)
        return {"logits": logits, "targets": torch.randint(classes, (count,), device=device)}

    for count, classes in ((3, 1000), (1, 1), (7, 127), (2, 4097)):
        yield Sample(f"{count}x{classes}", rows(count, classes))
    yield Sample("three rows", rows(3, 50), {"reduction": "sum"})
    ignored = rows(6, 50)
    ignored["targets"][::2] = -100
    yield Sample("ignored rows", ignored)
    ignored = rows(6, 50)
    ignored["targets"][1] = 7
    yield Sample("ignore index 7, none", ignored, {"ignore_index": 7, "reduction": "none"})
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    for name, value in options.items():
        yield Sample(name, rows(5, 65), {name: value, "reduction": "sum"})
    yield Sample("all options", rows(4, 5000), {**options, "reduction": "none"})
    batched = rows(6, 40)
    yield Sample("batched", {"logits": batched["logits"].view(2, 3, 40), "targets": batched["targets"].view(2, 3)})
    padded = rows(5, 64)
    yield Sample("row stride", {"logits": padded["logits"][:, :48], "targets": padded["targets"] % 48})
    sure = rows(4, 33)  # p and 1 nearly cancel
    sure["logits"][torch.arange(4), sure["targets"]] = 8.0
    yield Sample("sure of the target", sure, {"reduction": "sum"})


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for classes in (32000, 131072, 262144):
        logits = torch.empty(4096, classes, dtype=dtype)
        yield Sample(f"4096x{classes}", {"logits": logits, "targets": torch.zeros(4096, dtype=torch.int64)})


SPEC = OpSpec(
    name="cross_entropy",
    function=cross_entropy,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    flops=lambda sample: 5 * sample.tensors["logits"].numel(),
    compulsory_bytes=lambda sample: sample.nbytes("logits", "targets") + 4 * sample.tensors["targets"].numel(),
    strided=("logits",),
    tables={"columns": _COLUMNS},
)
