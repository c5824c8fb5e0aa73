"""Cross-entropy of each row of logits against a target class; one read of the logits gives loss and gradient.

With z = softcap · tanh(logits / softcap), or z = logits without a softcap, t the target, V the classes and ε the label
smoothing:

    lse = log Σ_j exp(z_j)
    loss = lse − (1 − ε) z_t − (ε / V) Σ_j z_j + z_loss · lse²        (z-loss: PaLM, arXiv:2204.02311)

Backward, for an upstream gradient g of a row's loss, with p_j = exp(z_j − lse):

    dlogits_j = g · (p_j (1 + 2 · z_loss · lse) − (1 − ε) [j = t] − ε / V) · (1 − (z_j / softcap)²)

Shapes: logits (…, classes), targets (…). Rows whose target is `ignore_index` have loss 0 and gradient 0 and are not
read. All arithmetic is float32 (float64 for float64 logits), the losses too: a loss rounded to bfloat16 has two
significant digits. lse is kept as two numbers, the row's maximum and Σ exp(z − maximum): added up, they would round
away what tells a sure prediction from a certain one. The gradient never goes over the logits, which are the caller's.

A row that fits one block is read once, by eager code that wants a gradient: the forward pass holds it in registers and
writes the gradient for the upstream that it anticipates, 1 (1 / the rows that count, for a mean). The backward pass
looks at the upstream that came and, only where it is another, computes the row again from the logits. Longer rows, and
graphs that a compiler or a checkpoint must see through, take two passes, each of which reads the logits.

Over a process group (`vocabulary_parallel`) each rank holds V/p of the classes, and pass one ends in two collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import cross_entropy_cpu
from tilewright.kernels.checks import check_float, check_same, check_tensors, is_number, is_whole
from tilewright.kernels.dispatch import HAS_TRITON, runs_triton
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.model_shapes import MODELS, batches
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import accumulation_dtype, as_rows
from tilewright.kernels.vocabulary_parallel import Shard, check_group, shard_of, whole_rows

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
    return_z_loss: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy along the last dimension, as ``torch.nn.functional.cross_entropy`` for (rows, classes).

    Args:
        logits: (…, classes); with a `group`, (…, classes / ranks): rank r holds the r-th part of the classes.
        targets: (…) int64, classes or `ignore_index`; with a `group`, of all the classes and the same on every rank.
        ignore_index: rows with this target count for nothing.
        label_smoothing: ε in [0, 1], spread evenly over all classes.
        z_loss: weight of the squared log-sum-exp.
        softcap: bounds the logits to ±softcap; None leaves them.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.
        group: the ``torch.distributed.ProcessGroup`` that the classes are split over; None where rows are whole. Every
            rank gets the same loss and, from the same upstream gradient, the gradient of its own logits.
        return_z_loss: return the z-loss apart as well, for a log; the loss contains it in any case.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (…) for ``"none"``. With `return_z_loss` a pair of them, the
        second the term z_loss · lse² reduced alike, through which no gradient flows.

    Raises:
        ValueError: an argument does not fit; on CPU also a target that is no class. On a GPU, where looking would wait
            for the device, such a row's loss is NaN.
    """
    check_tensors("cross_entropy", logits=logits)
    check_float("cross_entropy", logits=logits)
    check_loss_options("cross_entropy", label_smoothing, z_loss, softcap, reduction, group)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"cross_entropy: logits has shape {tuple(logits.shape)}; it must be (…, classes), at least one"
        )
    shard = shard_of(group, logits.shape[-1])
    check_targets("cross_entropy", targets, logits, "logits", shard.all_classes, ignore_index)
    if not runs_triton(logits):
        return reference(
            logits,
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            group=group,
            return_z_loss=return_z_loss,
        )
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    count = (targets != ignore_index).sum() if reduction == "mean" else None
    if group is not None:
        losses, z_losses = _ShardedRows.apply(logits, targets, options, group, True)
    else:
        losses, statistics = forward_op(logits, targets, *options, _anticipated(logits, count))
        z_losses = z_losses_in(statistics, targets)
    loss = reduce_losses(losses, targets, ignore_index, reduction, count)
    return (loss, reduce_losses(z_losses, targets, ignore_index, reduction, count)) if return_z_loss else loss


def check_loss_options(
    op: str, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, group: Any
) -> None:
    """Raise ``ValueError`` for an option of the loss that is out of its range."""
    if not (is_number(label_smoothing) and 0.0 <= label_smoothing <= 1.0):
        raise ValueError(f"{op}: label_smoothing is {label_smoothing!r}; it must be between 0 and 1")
    if not (is_number(z_loss) and z_loss >= 0.0):
        raise ValueError(f"{op}: z_loss is {z_loss!r}; it must be 0 or more and below 2⁶³")
    if softcap is not None and not (is_number(softcap) and softcap > 0.0):
        raise ValueError(f"{op}: softcap is {softcap!r}; it must be more than 0, or None, and below 2⁶³")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    check_group(op, group)


def check_targets(
    op: str, targets: torch.Tensor, rows: torch.Tensor, rows_name: str, classes: int, ignore_index: int
) -> None:
    """Raise ``ValueError`` unless `targets` are int64, one for each row of `rows`, and, on CPU, classes."""
    if not is_whole(ignore_index):
        raise ValueError(f"{op}: ignore_index is {ignore_index!r}; it must be an integer of 64 bits")
    check_tensors(op, targets=targets)
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


def reduce_losses(
    losses: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows' losses reduced; the mean is over the rows that count, and NaN where none does, as in PyTorch.

    `count` is the number of rows that count, where the caller has it already.
    """
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / ((targets != ignore_index).sum() if count is None else count)


def z_losses_in(statistics: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The term z_loss · lse² of each row, of the shape of `targets`, from the second output of `forward_op`."""
    return statistics[:, 2].view(targets.shape)


def losses_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    upstream: torch.Tensor | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    group: Any = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses of rows and, given the upstream gradient of each, dlogits: for ops that make logits chunk by chunk.

    Without checks and without autograd. One launch on the Triton path without a group, which reads each logit once up
    to the largest row that fits a block, twice beyond.

    Args:
        logits: (rows, classes), or (rows, classes / ranks) with a group.
        targets: (rows,).
        upstream: (rows,), any stride; None computes no gradient.
        ignore_index, label_smoothing, z_loss, softcap, group: as in `cross_entropy`.
        overwrite: the gradient may take the place of the logits.

    Returns:
        losses (rows,), their z-loss terms (rows,), and dlogits like `logits` or None.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    triton_runs = runs_triton(logits)
    # Past the op, whose schema promises a tensor of its own: not where something other than eager code looks on.
    in_place = overwrite and type(logits) is torch.Tensor and not torch.compiler.is_compiling()
    in_place = in_place and logits.is_contiguous()
    if triton_runs and group is None:
        if upstream is None:
            losses, statistics = forward_op(logits, targets, *options)
            return losses, z_losses_in(statistics, targets), None
        if in_place:
            losses, statistics, dlogits = _forward_backward_op.launch(upstream, logits, targets, *options, logits)
        else:
            losses, statistics, dlogits = _forward_backward_op(upstream, logits, targets, *options)
        return losses, z_losses_in(statistics, targets), dlogits

    if not triton_runs and group is None and not torch.compiler.is_compiling():
        dlogits = logits if in_place else torch.empty_like(logits)
        if not cross_entropy_cpu.serves(logits, options[3]) or not dlogits.is_contiguous():
            return _plain_rows(logits, targets, upstream, options, dlogits)
        statistics = cross_entropy_cpu.statistics_and_gradient(logits, targets, upstream, *options[:3], dlogits)
        losses, z_losses = _losses_from(statistics, targets, options, Shard(0, logits.shape[1]))
        return losses, z_losses, dlogits if upstream is not None else None
    shard = shard_of(group, logits.shape[-1])
    z = logits if triton_runs else _plain_z(logits, options[3])
    statistics = _statistics(z, targets, options, shard, group, triton_runs)
    losses, z_losses = _losses_from(statistics, targets, options, shard)
    if upstream is None:
        return losses, z_losses, None
    if not triton_runs:
        return losses, z_losses, _plain_gradient(upstream, z, targets, statistics, options, shard).to(logits.dtype)
    if in_place:
        return losses, z_losses, backward_op.launch(upstream, logits, targets, statistics, *options, *shard, logits)
    return losses, z_losses, backward_op(upstream, logits, targets, statistics, *options, *shard)


def reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    group: Any = None,
    return_z_loss: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    if group is not None:
        options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
        losses, z_losses = _ShardedRows.apply(logits, targets, options, group, False)
    else:
        z = _plain_z(logits, softcap or 0.0).reshape(-1, logits.shape[-1])
        flat = targets.reshape(-1)
        losses = F.cross_entropy(z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
        z_losses = torch.zeros_like(losses)
        if z_loss:
            z_losses = torch.where(flat == ignore_index, 0.0, z_loss * z.logsumexp(-1).square())
            losses = losses + z_losses
        losses, z_losses = losses.view(targets.shape), z_losses.detach().view(targets.shape)
    loss = reduce_losses(losses, targets, ignore_index, reduction)
    return (loss, reduce_losses(z_losses, targets, ignore_index, reduction)) if return_z_loss else loss


# For rows that are split over a group, or a chunk of a head on CPU: the kernels' steps in plain PyTorch. The options
# are ignore_index, label_smoothing, z_loss and softcap, in which 0 stands for none.
_Options = tuple[int, float, float, float]


def _plain_z(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    z = logits.to(accumulation_dtype(logits.dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def _plain_statistics(z: torch.Tensor, targets: torch.Tensor, first_class: int, with_sum: bool) -> torch.Tensor:
    """(rows, 4): maximum, Σ exp(z − maximum), z of the target or 0 where it is not here, Σ z or 0."""
    top = z.amax(-1)
    total = torch.exp(z - torch.where(top == -torch.inf, 0.0, top)[:, None]).sum(-1)
    column = targets - first_class
    here = (column >= 0) & (column < z.shape[1])
    z_target = torch.where(here, z.gather(1, torch.where(here, column, 0)[:, None])[:, 0], 0.0)
    return torch.stack([top, total, z_target, z.sum(-1) if with_sum else torch.zeros_like(top)], 1)


def _plain_gradient(
    upstream: torch.Tensor,
    z: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    options: _Options,
    shard: Shard,
) -> torch.Tensor:
    """dlogits in the dtype of `z`. A comparison finds the target: Inductor can fuse it, a scatter it cannot."""
    ignore_index, label_smoothing, z_loss, softcap = options
    top, total = statistics[:, 0], statistics[:, 1]
    columns = torch.arange(shard.first_class, shard.first_class + z.shape[1], device=z.device)
    p = torch.exp(z - top[:, None]) / total[:, None]
    dz = p - label_smoothing / shard.all_classes
    # Not `where` of two Python numbers, which makes float32 of them.
    dz = torch.where(columns[None, :] == targets[:, None], dz - (1.0 - label_smoothing), dz)
    if z_loss:  # after p − 1, which nearly cancels where the model is sure
        dz = dz + p * (2.0 * z_loss * (top + total.log()))[:, None]
    if softcap:
        dz = dz * (1.0 - (z / softcap).square())
    counts = (targets != ignore_index)[:, None]
    return torch.where(counts, dz * upstream[:, None], 0.0)


# Elements worked on at a time, which then stay in a core's cache from one operation to the next.
_CACHED_ELEMENTS = 1 << 19


def _plain_rows(
    logits: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor | None, options: _Options, dlogits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`losses_and_gradient` in plain eager PyTorch, a few rows at a time, with the fewest passes over them."""
    losses = torch.empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype), device=logits.device)
    z_losses = torch.empty_like(losses)
    step = max(1, _CACHED_ELEMENTS // max(logits.shape[1], 1))
    for start in range(0, logits.shape[0], step):
        span = slice(start, start + step)
        up = upstream[span] if upstream is not None else None
        losses[span], z_losses[span], gradient = _few_rows(logits[span], targets[span], up, options)
        if gradient is not None:
            dlogits[span] = gradient
    return losses, z_losses, dlogits if upstream is not None else None


def _few_rows(
    logits: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor | None, options: _Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    ignore_index, label_smoothing, z_loss, softcap = options
    classes = logits.shape[1]
    z = _plain_z(logits, softcap)
    p = torch.softmax(z, -1)
    top = z.amax(-1)
    # The largest probability is 1 / Σ exp(z − top), and never too small to invert.
    total = p.amax(-1).reciprocal_()
    here = (targets >= 0) & (targets < classes)
    place = torch.where(here, targets, 0)[:, None]
    z_target = torch.where(here, z.gather(1, place)[:, 0], 0.0)
    sum_z = z.sum(-1) if label_smoothing else torch.zeros_like(top)
    shard = Shard(0, classes)
    losses, z_losses = _losses_from(torch.stack([top, total, z_target, sum_z], 1), targets, options, shard)
    if upstream is None:
        return losses, z_losses, None
    # p − 1 first, which nearly cancels where the model is sure; then what z-loss adds.
    at_target = p.gather(1, place) - torch.where(here, 1.0 - label_smoothing, 0.0)[:, None].to(p.dtype)
    if z_loss:
        slope = (2.0 * z_loss * (top + total.log()))[:, None]
        at_target += p.gather(1, place) * slope
        p *= 1.0 + slope
    p.scatter_(1, place, at_target)
    if label_smoothing:
        p -= label_smoothing / classes
    if softcap:
        p *= 1.0 - (z / softcap).square()
    counts = targets != ignore_index
    p *= (upstream * counts)[:, None]
    p[~counts] = 0.0  # also where a logit is not finite
    return losses, z_losses, p


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor, options: _Options, shard: Shard, group: Any, triton_runs: bool
) -> torch.Tensor:
    """(rows, 4), of whole rows; the logits are what `_plain_z` made of them where the reference runs."""
    if triton_runs:
        parts = _shard_op(logits, targets, options[0], options[3], shard.first_class)
    else:
        parts = _plain_statistics(logits, targets, shard.first_class, with_sum=options[1] > 0.0)
    return parts if group is None else whole_rows("cross_entropy", parts, logits.shape[-1], group)


def _losses_from(
    statistics: torch.Tensor, targets: torch.Tensor, options: _Options, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and z-loss terms (rows,) from the statistics of whole rows, as `_row_loss` has them in the kernels."""
    ignore_index, label_smoothing, z_loss, _ = options
    top, total, z_target, sum_z = statistics.unbind(1)
    log_sum = total.log()
    # The square may be infinite, of which 0 times would be NaN.
    z_losses = z_loss * (top + log_sum).square() if z_loss else torch.zeros_like(top)
    if label_smoothing:
        z_target = (1.0 - label_smoothing) * z_target + label_smoothing * (sum_z / shard.all_classes)
    losses = log_sum - (z_target - top) + z_losses
    losses = torch.where((targets >= 0) & (targets < shard.all_classes), losses, torch.nan)
    counts = targets != ignore_index
    return torch.where(counts, losses, 0.0), torch.where(counts, z_losses, 0.0)


class _ShardedRows(torch.autograd.Function):
    """Losses and z-loss terms of rows that are split over a group."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, options: _Options, group: Any, triton_runs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, flat, shard = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), shard_of(group, logits.shape[-1])
        z = rows if triton_runs else _plain_z(rows, options[3])
        statistics = _statistics(z, flat, options, shard, group, triton_runs)
        losses, z_losses = (x.view(targets.shape) for x in _losses_from(statistics, flat, options, shard))
        ctx.mark_non_differentiable(z_losses)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.options, ctx.shard, ctx.triton_runs = options, shard, triton_runs
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy over a group has no second derivatives: for those, compute the same from plain PyTorch "
                "operations"
            )
        logits, targets, statistics = ctx.saved_tensors
        if ctx.triton_runs:
            dlogits = backward_op(upstream, logits, targets, statistics, *ctx.options, *ctx.shard)
        else:
            z = _plain_z(logits.reshape(-1, logits.shape[-1]), ctx.options[3])
            flat = (upstream.reshape(-1), z, targets.reshape(-1))
            dlogits = _plain_gradient(*flat, statistics, ctx.options, ctx.shard).to(logits.dtype).view(logits.shape)
        return dlogits, None, None, None, None


# A row that fits one block is held in registers, 32 elements a thread. With 64 registers a thread at 32 warps, the most
# that a block may have, a wider one would spill.
_WHOLE_ROW = LaunchTable(
    "cross_entropy whole row",
    {
        80: (
            Configuration(2048, 4),
            Configuration(8192, 8),
            Configuration(16384, 16),
            Configuration(32768, 32),
        )
    },
)
# The columns of a longer row that one step reads.
_COLUMNS = LaunchTable(
    "cross_entropy columns",
    {
        80: (
            Configuration(1024, 4, {"BLOCK_COLUMNS": 1024}),
            Configuration(1 << 31, 8, {"BLOCK_COLUMNS": 4096}),
        )
    },
    tuple(
        Configuration(1 << 31, warps, {"BLOCK_COLUMNS": columns})
        for columns, warps in ((2048, 4), (2048, 8), (4096, 4), (4096, 16), (8192, 16))
    ),
)


if HAS_TRITON:

    @triton.jit
    def _softcapped(x, softcap, HAS_SOFTCAP: tl.constexpr):
        if HAS_SOFTCAP:
            # tanh(a) = 1 − 2 / (exp(2a) + 1), which saturates rightly where exp overflows; near 0, where that cancels
            # and a large softcap would magnify what is lost, a polynomial fitted to |a| ≤ 0.25 (error 1e-8).
            a = x * (1.0 / softcap)
            square = a * a
            series = (-5.188622e-2 * square + 1.3328003e-1) * square - 3.3333306e-1
            far = softcap * (1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0))
            x = tl.where(square < 0.0625, x + x * square * series, far)
        return x

    @triton.jit
    def _target_z(logits_ptr, target, counts, classes, softcap, HAS_SOFTCAP: tl.constexpr):
        """z of the target; 0 where it is none of the classes here."""
        here = counts & (target >= 0) & (target < classes)
        return _softcapped(tl.load(logits_ptr + target, mask=here, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)

    @triton.jit
    def _masked_z(logits_ptr, columns, counts, classes, softcap, HAS_SOFTCAP: tl.constexpr):
        """z of a block of columns, −∞ past the last class; some number or other in a row that does not count."""
        mask = columns < classes
        # A row that does not count has no columns to read. (`mask & counts` is no mask in Triton 3.9's interpreter.)
        read = columns < tl.where(counts, classes, 0)
        z = tl.load(logits_ptr + columns, mask=read, other=-float("inf")).to(tl.float32)
        if HAS_SOFTCAP:
            z = tl.where(mask, _softcapped(z, softcap, HAS_SOFTCAP), -float("inf"))
        return z

    @triton.jit
    def _row_sums(
        logits_ptr,
        counts,
        classes,
        softcap,
        HAS_SMOOTHING: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        """Maximum, Σ exp(z − maximum) and Σ z of a row, read once in blocks of columns."""
        # Each lane has 8 neighbouring columns, one 128-bit load of 16-bit logits, and keeps one maximum and sum for
        # them: one exponential to rescale for 8 elements. The lanes meet once, at the end.
        VECTOR: tl.constexpr = 8
        LANES: tl.constexpr = BLOCK_COLUMNS // VECTOR
        offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
        top = tl.full([LANES], -float("inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        sum_z = tl.zeros([LANES], tl.float32)
        for start in range(0, tl.where(counts, classes, 0), BLOCK_COLUMNS):
            z = _masked_z(logits_ptr, start + offsets, counts, classes, softcap, HAS_SOFTCAP)
            new_top = tl.maximum(top, tl.max(z, axis=1))
            finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - finite_top) + tl.sum(tl.exp(z - finite_top[:, None]), axis=1)
            top = new_top
            if HAS_SMOOTHING:
                sum_z += tl.sum(tl.where(start + offsets < classes, z, 0.0), axis=1)
        row_top = tl.max(top, axis=0)
        finite_top = tl.where(row_top == -float("inf"), 0.0, row_top)  # a rank's share of a row may be all −inf
        row_total = tl.sum(total * tl.exp(top - finite_top), axis=0)
        # Any finite numbers for a row that was not read: its gradient is 0 times what they give.
        return tl.where(counts, row_top, 0.0), tl.where(counts, row_total, 1.0), tl.sum(sum_z, axis=0)

    @triton.jit
    def _store_loss(
        losses_ptr,
        statistics_ptr,
        row,
        target,
        counts,
        row_top,
        total,
        z_target,
        sum_z,
        classes,
        label_smoothing,
        z_loss,
        HAS_SMOOTHING: tl.constexpr,
    ):
        log_sum = tl.log(total)
        lse = row_top + log_sum
        z_term = z_loss * lse * lse
        if HAS_SMOOTHING:
            z_target = (1.0 - label_smoothing) * z_target + label_smoothing * (sum_z / classes)
        # Not lse − z_target: where the model is sure, both are large and their difference would be rounding alone.
        loss = log_sum - (z_target - row_top) + z_term
        # A target that is no class makes the loss NaN: wrong data must not look like a number.
        loss = tl.where((target >= 0) & (target < classes), loss, float("nan"))
        tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
        tl.store(statistics_ptr + 3 * row, row_top)
        tl.store(statistics_ptr + 3 * row + 1, total)
        tl.store(statistics_ptr + 3 * row + 2, tl.where(counts, z_term, 0.0))

    @triton.jit
    def _dlogits(
        z, columns, target, row_top, total, upstream, classes, label_smoothing, z_loss, softcap,
        HAS_Z_LOSS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
    ):  # fmt: skip
        """The gradient of a block of logits; `columns` and `target` count from the same class."""
        # A whole row is held in registers as one number an element, and the compiler keeps what is used again. Without
        # a softcap that is exp(z − row_top), which the sum took. With one, whose derivative wants z, it is z − row_top;
        # so p is an exponential of its own there, and z the difference plus row_top.
        if HAS_SOFTCAP:
            bits = (z - row_top) * 1.4426950408889634  # log2 e
            p = tl.exp2(bits - tl.log2(total))
        else:
            p = tl.exp(z - row_top) * (1.0 / total)
        # Subtracted in float32, before any rounding, and the z-loss added after: p and 1 nearly cancel where the model
        # is sure.
        other = label_smoothing / classes
        dz = p - tl.where(columns == target.to(tl.int32), (1.0 - label_smoothing) + other, other)
        if HAS_Z_LOSS:
            dz += p * (2.0 * z_loss * (row_top + tl.log(total)))
        if HAS_SOFTCAP:
            tanh = bits * (0.6931471805599453 / softcap) + row_top / softcap
            dz *= 1.0 - tanh * tanh
        return dz * upstream

    @triton.jit
    def _store_dlogits(
        logits_ptr,
        dlogits_ptr,
        target,
        counts,
        row_top,
        total,
        upstream,
        classes,
        all_classes,
        label_smoothing,
        z_loss,
        softcap,
        HAS_Z_LOSS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        """The gradient of a row, in blocks of columns; `dlogits_ptr` may be `logits_ptr`."""
        for start in range(0, classes, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            mask = columns < classes
            read = columns < tl.where(counts, classes, 0)
            z = tl.load(logits_ptr + columns, mask=read, other=0.0).to(tl.float32)
            z = _softcapped(z, softcap, HAS_SOFTCAP)
            dz = _dlogits(
                z, columns, target, row_top, total, upstream, all_classes, label_smoothing, z_loss, softcap,
                HAS_Z_LOSS, HAS_SOFTCAP,
            )  # fmt: skip
            tl.store(dlogits_ptr + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)

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
        counts = target != ignore_index
        z_target = _target_z(logits_ptr, target, counts, classes, softcap, HAS_SOFTCAP)
        row_top, total, sum_z = _row_sums(
            logits_ptr, counts, classes, softcap, HAS_SMOOTHING, HAS_SOFTCAP, BLOCK_COLUMNS
        )
        _store_loss(
            losses_ptr, statistics_ptr, row, target, counts, row_top, total, z_target, sum_z, classes,
            label_smoothing, z_loss, HAS_SMOOTHING,
        )  # fmt: skip

    @triton.jit
    def _forward_shard(
        logits_ptr,
        targets_ptr,
        statistics_ptr,
        logits_stride,
        classes,
        first_class,
        ignore_index,
        softcap,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        target = tl.load(targets_ptr + row)
        counts = target != ignore_index
        z_target = _target_z(logits_ptr, target - first_class, counts, classes, softcap, HAS_SOFTCAP)
        row_top, total, sum_z = _row_sums(logits_ptr, counts, classes, softcap, True, HAS_SOFTCAP, BLOCK_COLUMNS)
        tl.store(statistics_ptr + 4 * row, row_top)
        tl.store(statistics_ptr + 4 * row + 1, total)
        tl.store(statistics_ptr + 4 * row + 2, z_target)
        tl.store(statistics_ptr + 4 * row + 3, sum_z)

    @triton.jit
    def _backward(
        upstream_ptr,
        anticipated_ptr,
        logits_ptr,
        targets_ptr,
        statistics_ptr,
        dlogits_ptr,
        upstream_stride,
        logits_stride,
        statistics_stride,
        dlogits_stride,
        classes,
        first_class,
        all_classes,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        HAS_ANTICIPATED: tl.constexpr,
        HAS_Z_LOSS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        if HAS_ANTICIPATED:  # noqa: SIM102  one condition is the compiler's, the other the device's
            if upstream == tl.load(anticipated_ptr):  # the row's gradient is there already
                return
        target = tl.load(targets_ptr + row)
        counts = target != ignore_index
        row_top = tl.load(statistics_ptr + row * statistics_stride)
        total = tl.load(statistics_ptr + row * statistics_stride + 1)
        _store_dlogits(
            logits_ptr + row * logits_stride, dlogits_ptr + row * dlogits_stride, target - first_class, counts, row_top,
            total, tl.where(counts, upstream, 0.0), classes, all_classes, label_smoothing, z_loss, softcap,
            HAS_Z_LOSS, HAS_SOFTCAP, BLOCK_COLUMNS,
        )  # fmt: skip

    @triton.jit
    def _forward_backward(
        upstream_ptr,
        logits_ptr,
        targets_ptr,
        losses_ptr,
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
        HAS_SMOOTHING: tl.constexpr,
        HAS_Z_LOSS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        target = tl.load(targets_ptr + row)
        counts = target != ignore_index
        # Before the sums, whose barriers keep it before the stores: the gradient may go over the logits.
        z_target = _target_z(logits_ptr, target, counts, classes, softcap, HAS_SOFTCAP)
        # There are 64 registers for 32 elements and all else. Two halves, so that those of one are free again before
        # the gradient of the other is begun; and the loss where fewest registers are taken, which is last without a
        # softcap, and first with one, whose gradient has constants of its own. With these no audited launch spills; the
        # widest rows still do at odd strides with a softcap, and with smoothing and z-loss alone on Ampere.
        HALF: tl.constexpr = BLOCK_COLUMNS // 2
        left = tl.arange(0, HALF)
        right = HALF + left
        z_left = _masked_z(logits_ptr, left, counts, classes, softcap, HAS_SOFTCAP)
        z_right = _masked_z(logits_ptr, right, counts, classes, softcap, HAS_SOFTCAP)
        sum_z = 0.0
        if HAS_SMOOTHING:  # first, so that z itself is not held for it
            both = tl.where(left < classes, z_left, 0.0) + tl.where(right < classes, z_right, 0.0)
            sum_z = tl.sum(both, axis=0)
        # Any finite numbers for a row that was not read: its gradient is 0 times what they give.
        row_top = tl.where(counts, tl.max(tl.maximum(z_left, z_right), axis=0), 0.0)
        total = tl.sum(tl.exp(z_left - row_top) + tl.exp(z_right - row_top), axis=0)
        total = tl.where(counts, total, 1.0)
        upstream = tl.where(counts, tl.load(upstream_ptr + row * upstream_stride).to(tl.float32), 0.0)
        if HAS_SOFTCAP:
            _store_loss(
                losses_ptr, statistics_ptr, row, target, counts, row_top, total, z_target, sum_z, classes,
                label_smoothing, z_loss, HAS_SMOOTHING,
            )  # fmt: skip
        dlogits_ptr += row * dlogits_stride
        dz = _dlogits(
            z_left, left, target, row_top, total, upstream, classes, label_smoothing, z_loss, softcap,
            HAS_Z_LOSS, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dlogits_ptr + left, dz.to(dlogits_ptr.dtype.element_ty), mask=left < classes)
        dz = _dlogits(
            z_right, right, target, row_top, total, upstream, classes, label_smoothing, z_loss, softcap,
            HAS_Z_LOSS, HAS_SOFTCAP,
        )  # fmt: skip
        tl.store(dlogits_ptr + right, dz.to(dlogits_ptr.dtype.element_ty), mask=right < classes)
        if not HAS_SOFTCAP:
            _store_loss(
                losses_ptr, statistics_ptr, row, target, counts, row_top, total, z_target, sum_z, classes,
                label_smoothing, z_loss, HAS_SMOOTHING,
            )  # fmt: skip

    @triton.jit
    def _forward_backward_wide(
        upstream_ptr,
        logits_ptr,
        targets_ptr,
        losses_ptr,
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
        HAS_SMOOTHING: tl.constexpr,
        HAS_Z_LOSS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
    ):
        # One launch for both passes, so that the second finds much of the row in the L2 cache.
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        target = tl.load(targets_ptr + row)
        counts = target != ignore_index
        upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        # Before the sums, whose barriers keep it before the stores: the gradient may go over the logits.
        z_target = _target_z(logits_ptr, target, counts, classes, softcap, HAS_SOFTCAP)
        row_top, total, sum_z = _row_sums(
            logits_ptr, counts, classes, softcap, HAS_SMOOTHING, HAS_SOFTCAP, BLOCK_COLUMNS
        )
        _store_loss(
            losses_ptr, statistics_ptr, row, target, counts, row_top, total, z_target, sum_z, classes,
            label_smoothing, z_loss, HAS_SMOOTHING,
        )  # fmt: skip
        _store_dlogits(
            logits_ptr, dlogits_ptr + row * dlogits_stride, target, counts, row_top, total,
            tl.where(counts, upstream, 0.0), classes, classes, label_smoothing, z_loss, softcap,
            HAS_Z_LOSS, HAS_SOFTCAP, BLOCK_COLUMNS,
        )  # fmt: skip


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
    anticipated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((targets.numel(), 3), dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return losses, statistics
    rows = as_rows(logits)
    options = (rows.stride(0), rows.shape[1], ignore_index, label_smoothing, z_loss, softcap)
    constants = {"HAS_SMOOTHING": label_smoothing > 0.0, **_column_constants(rows.shape[1], softcap, logits.device)}
    _forward[(rows.shape[0],)](rows, targets.contiguous(), losses, statistics, *options, **constants)
    return losses, statistics


def _launch_shard(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, softcap: float, first_class: int
) -> torch.Tensor:
    statistics = torch.empty((targets.numel(), 4), dtype=torch.float32, device=logits.device)
    if logits.numel() == 0:
        return statistics
    rows = as_rows(logits)
    options = (rows.stride(0), rows.shape[1], first_class, ignore_index, softcap)
    constants = _column_constants(rows.shape[1], softcap, logits.device)
    _forward_shard[(rows.shape[0],)](rows, targets.contiguous(), statistics, *options, **constants)
    return statistics


def _launch_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int = 0,
    all_classes: int | None = None,
    dlogits: torch.Tensor | None = None,
    anticipated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Into `dlogits` where it is given; rows whose upstream is the one `anticipated` are there already."""
    if dlogits is None:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return dlogits
    rows, into, upstream = as_rows(logits), dlogits.view(-1, logits.shape[-1]), upstream.reshape(-1)
    classes = rows.shape[1]
    strides = (upstream.stride(0), rows.stride(0), statistics.stride(0), into.stride(0))
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _backward[(rows.shape[0],)](
        upstream,
        anticipated if anticipated is not None else upstream,
        rows,
        targets.contiguous(),
        statistics,
        into,
        *strides,
        classes,
        first_class,
        all_classes or classes,
        *options,
        HAS_ANTICIPATED=anticipated is not None,
        HAS_Z_LOSS=z_loss > 0.0,
        **_column_constants(classes, softcap, logits.device),
    )
    return dlogits


def _launch_forward_backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    dlogits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dlogits` may be `logits` itself, which the gradient then replaces."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((targets.numel(), 3), dtype=torch.float32, device=logits.device)
    if dlogits is None:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return losses, statistics, dlogits
    rows, into, upstream = as_rows(logits), dlogits.view(-1, logits.shape[-1]), upstream.reshape(-1)
    classes = rows.shape[1]
    pointers = (upstream, rows, targets.contiguous(), losses, statistics, into)
    strides = (upstream.stride(0), rows.stride(0), into.stride(0))
    options = (classes, ignore_index, label_smoothing, z_loss, softcap)
    if classes <= _WHOLE_ROW.largest():
        kernel, warps = _forward_backward, _WHOLE_ROW.pick(classes, logits.device).num_warps
        constants = {
            "HAS_SOFTCAP": softcap > 0.0,
            "BLOCK_COLUMNS": max(triton.next_power_of_2(classes), 16),
            "num_warps": warps,
        }
    else:
        kernel, constants = _forward_backward_wide, _column_constants(classes, softcap, logits.device)
    flags = {"HAS_SMOOTHING": label_smoothing > 0.0, "HAS_Z_LOSS": z_loss > 0.0}
    kernel[(rows.shape[0],)](*pointers, *strides, *options, **flags, **constants)
    return losses, statistics, dlogits


def _fake_forward(logits: torch.Tensor, targets: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    losses = logits.new_empty(targets.shape, dtype=torch.float32)
    return losses, logits.new_empty((targets.numel(), 3), dtype=torch.float32)


def _fake_forward_backward(
    upstream: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_forward(logits, targets), logits.new_empty(logits.shape)


# A softcap of 0 stands for none. `anticipated`, a scalar, is the upstream gradient that every row probably gets; only
# the eager call has a use for it: see `_OneRead`.
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
forward_op = register(
    f"cross_entropy(Tensor logits, Tensor targets, {_OPTIONS}, Tensor? anticipated=None) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
backward_op = register(
    f"cross_entropy_backward(Tensor upstream, Tensor logits, Tensor targets, Tensor statistics, {_OPTIONS}, "
    "SymInt first_class=0, SymInt? all_classes=None) -> Tensor",
    _launch_backward,
    lambda upstream, logits, *_: logits.new_empty(logits.shape),
)
_shard_op = register(
    "cross_entropy_shard(Tensor logits, Tensor targets, int ignore_index, float softcap, SymInt first_class) -> Tensor",
    _launch_shard,
    lambda logits, targets, *_: logits.new_empty((targets.numel(), 4), dtype=torch.float32),
)
_forward_backward_op = register(
    f"cross_entropy_forward_backward(Tensor upstream, Tensor logits, Tensor targets, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _launch_forward_backward,
    _fake_forward_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, targets, *options = inputs
    ctx.options = options[:4]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _gradients(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
    return backward_op(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 6


differentiate(forward_op, _gradients, _setup_context)
refuse_double_backward(backward_op)
refuse_double_backward(_forward_backward_op)


def _anticipated(logits: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor | None:
    """The upstream gradient that a row gets where the loss is what `backward` is called on, where it is of use."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return None
    if logits.shape[-1] > _WHOLE_ROW.largest():
        return None
    # The bits that autograd's division of 1 by the count gives.
    one = torch.ones((), dtype=torch.float32, device=logits.device)
    return one if count is None else one / count


class _OneRead(torch.autograd.Function):
    """`forward_op` in plain eager code: the forward pass writes the gradient too, beside the logits it has saved."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *ctx.options, anticipated = rest
        upstream = anticipated.expand(targets.shape)
        losses, statistics, dlogits = _forward_backward_op.launch(upstream, logits, targets, *ctx.options)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(logits, targets, statistics, dlogits, anticipated)
        ctx.handed_out = False
        return losses, statistics

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[Any, ...]:
        *inputs, dlogits, anticipated = ctx.saved_tensors
        # The buffer is the caller's once it was returned; a second backward pass through the graph needs another. A
        # compiler of backward passes is to see the op and not what a launch is made of.
        if ctx.handed_out or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward_op(upstream, *inputs, *ctx.options), *[None] * 6
        ctx.handed_out = True
        backward_op.launch(upstream, *inputs, *ctx.options, 0, None, dlogits, anticipated)
        # `data` has a version of its own: what the caller does to it in place is no change of a saved tensor.
        return dlogits.data, *[None] * 6


_two_passes = forward_op.differentiable


def _eager_rows(*args: Any) -> Any:
    """What `forward_op` is in plain eager code that wants a gradient."""
    assert _two_passes is not None
    one_read = len(args) == 7 and args[6] is not None
    return _OneRead.apply(*args) if one_read else _two_passes(*args)


forward_op.differentiable = _eager_rows


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
    yield Sample("z-loss apart", rows(3, 40), {"z_loss": 1e-2, "return_z_loss": True})
    everything = rows(4, 5000)
    everything["targets"][2] = -100
    yield Sample("all options", everything, {**options, "reduction": "none"})
    # Past the widest row that fits one block.
    wide = rows(3, 33000)
    wide["targets"][1] = -100
    yield Sample("all options, wide", wide, {**options, "reduction": "sum"})
    yield Sample("no rows", rows(0, 50), {"reduction": "sum"})
    batched = rows(6, 40)
    yield Sample("batched", {"logits": batched["logits"].view(2, 3, 40), "targets": batched["targets"].view(2, 3)})
    padded = rows(5, 64)
    yield Sample("row stride", {"logits": padded["logits"][:, :48], "targets": padded["targets"] % 48})
    sure = rows(4, 33)  # p and 1 nearly cancel
    sure["logits"][torch.arange(4), sure["targets"]] = 8.0
    yield Sample("sure of the target", sure, {"reduction": "sum"})


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    vocabularies = {model.name: model.vocabulary for model in MODELS}
    vocabularies |= {f"{classes:,} classes": classes for classes in (32000, 32768, 262144)}
    for name, classes in vocabularies.items():
        for length_name, sequences, length in batches(small):
            if length_name != "2k" and "classes" in name:
                continue
            # A row is a program's whole work: two of them show it.
            rows = 2 if small else sequences * length
            tensors = {
                "logits": torch.empty(rows, classes, dtype=dtype),
                "targets": torch.zeros(rows, dtype=torch.int64),
            }
            yield Sample(f"{name} {length_name}", tensors)
            if length_name == "2k":
                yield Sample(f"{name} {length_name}, all options", tensors, options)


def _work(sample: Sample) -> Passes:
    """Logits and targets in, a number of each row out; backward, the logits in again and their gradient out."""
    logits, targets = sample.tensors["logits"], sample.tensors["targets"]
    inputs = sample.nbytes("logits", "targets")
    return Passes(
        Work(5 * logits.numel(), inputs + 4 * targets.numel()),
        Work(4 * logits.numel(), inputs + logits.nbytes),
        common=Work(2 * logits.numel(), inputs),
    )


SPEC = OpSpec(
    name="cross_entropy",
    function=cross_entropy,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=_work,
    strided=("logits",),
    tables={"whole row": _WHOLE_ROW, "columns": _COLUMNS},
)
