"""Cross-entropy of a linear head, from hidden states, without ever holding all the logits.

    logits = hidden · weightᵀ + bias          loss = cross_entropy(logits, targets)

The logits of one chunk of rows exist at a time: their losses and their gradient dlogits are computed, then

    dhidden = dlogits · weight          dweight = Σ_chunks dlogitsᵀ · hidden          dbias = Σ_rows dlogits

(the plan of Liger-Kernel's and Apple's fused heads, arXiv:2411.09009). For the reductions "mean" and "sum" the
gradients are computed along with the loss, up to the upstream scalar, so that each logit is computed once. For "none"
each row has an upstream gradient of its own, not known in the forward pass; the backward pass computes the logits anew.

Shapes: hidden (…, width), weight (classes, width), bias (classes,), targets (…). The matrix products run in the
inputs' dtype, the loss in float32, and dweight and dbias are summed over the chunks in float32. See `cross_entropy`
for the maths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.checks import check_float, check_same, check_shape
from tilewright.kernels.cross_entropy import SPEC as CROSS_ENTROPY
from tilewright.kernels.cross_entropy import backward_op, check_loss_options, check_targets, forward_op
from tilewright.kernels.cross_entropy import reference as rows_reference
from tilewright.kernels.dispatch import runs_triton
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import accumulation_dtype


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    group: Any = None,
) -> torch.Tensor:
    """``cross_entropy(linear(hidden, weight, bias), targets)`` in bounded memory.

    Args:
        hidden: (…, width).
        weight: (classes, width), of the dtype of `hidden`.
        targets: (…) int64, classes or `ignore_index`.
        bias: (classes,).
        ignore_index, label_smoothing, z_loss, softcap, reduction, group: as in `cross_entropy`.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (…) for ``"none"``.

    Raises:
        ValueError: an argument does not fit; on CPU also a target that is no class.
    """
    op = "linear_cross_entropy"
    check_float(op, hidden=hidden, weight=weight, bias=bias)
    check_loss_options(op, label_smoothing, z_loss, softcap, reduction, group)
    if hidden.ndim == 0 or weight.ndim != 2:
        raise ValueError(
            f"{op}: hidden must be (…, width) and weight (classes, width); weight has {weight.ndim} dimensions"
        )
    check_shape(op, "weight", weight, (weight.shape[0], hidden.shape[-1]), "(classes, the last dimension of hidden)")
    check_shape(op, "bias", bias, weight.shape[:1], "one for each row of weight")
    check_same(op, "hidden", hidden, weight=weight, bias=bias)
    check_targets(op, targets, hidden, "hidden", weight.shape[0], ignore_index)

    loss = _Loss(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if reduction == "none":
        losses: torch.Tensor = _Rows.apply(flat, weight, flat_targets, bias, loss)
        return losses.view(targets.shape)
    total: torch.Tensor = _Total.apply(flat, weight, flat_targets, bias, loss)
    # Divided out here: gradients rounded to float16 after a division by many rows would lose what loss scaling saves.
    return total / (flat_targets != ignore_index).sum() if reduction == "mean" else total


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same with all the logits at once."""
    return rows_reference(F.linear(hidden, weight, bias), targets, **options)


@dataclass(frozen=True)
class _Loss:
    """The options of the loss of one row; a softcap of 0 stands for none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float

    def astuple(self) -> tuple[int, float, float, float]:
        return self.ignore_index, self.label_smoothing, self.z_loss, self.softcap


# Logits that exist at a time, as elements: on a GPU enough rows to fill it, on a CPU few enough to stay in its cache.
_CHUNK_ELEMENTS = {"cuda": 1 << 27, "cpu": 1 << 22}


def chunk_rows(classes: int, device: torch.device) -> int:
    """Rows whose logits exist at a time."""
    budget = _CHUNK_ELEMENTS.get(device.type, 1 << 22)
    return max(128, 1 << (max(budget // classes, 1).bit_length() - 1))


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Each chunk's rows, hidden states and logits."""
    step = chunk_rows(weight.shape[0], hidden.device)
    for start in range(0, hidden.shape[0], step):
        span = slice(start, min(start + step, hidden.shape[0]))
        part = hidden[span]
        yield span, part, F.linear(part, weight, bias)


def _losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor | None, loss: _Loss
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (rows,) of one chunk and, given the upstream gradient of each, dlogits (rows, classes)."""
    if runs_triton(logits):
        losses, statistics = forward_op(logits, targets, *loss.astuple())
        if upstream is None:
            return losses, None
        return losses, backward_op(upstream, logits, targets, statistics, *loss.astuple())
    # Plain PyTorch, without scatters, so that Inductor makes two passes of it.
    z = logits.to(accumulation_dtype(logits.dtype))
    if loss.softcap:
        z = loss.softcap * torch.tanh(z / loss.softcap)
    # The maximum apart, as PyTorch's own does: where the model is sure, lse − z_target would be rounding alone.
    top = z.amax(-1)
    log_sum = torch.exp(z - top[:, None]).sum(-1).log()
    lse = top + log_sum
    counts = targets != loss.ignore_index
    z_target = z.gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
    if loss.label_smoothing:
        z_target = (1.0 - loss.label_smoothing) * z_target + loss.label_smoothing * z.mean(-1)
    losses = torch.where(counts, log_sum - (z_target - top) + loss.z_loss * lse.square(), 0.0)
    if upstream is None:
        return losses, None
    dz = torch.exp((z - top[:, None]) - log_sum[:, None])
    if loss.z_loss:
        dz = dz * (1.0 + 2.0 * loss.z_loss * lse)[:, None]
    is_target = torch.arange(z.shape[1], device=z.device)[None, :] == targets[:, None]
    dz = dz - loss.label_smoothing / z.shape[1] - torch.where(is_target, 1.0 - loss.label_smoothing, 0.0)
    if loss.softcap:
        dz = dz * (1.0 - (z / loss.softcap).square())
    return losses, (dz * torch.where(counts, upstream, 0.0)[:, None]).to(logits.dtype)


def _weight_gradient(dlogits: torch.Tensor, hidden: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """dlogitsᵀ · hidden, not rounded before it is summed where the device offers that."""
    if hidden.device.type == "cuda" and hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(dlogits.t(), hidden, out_dtype=wide)
    return (dlogits.t() @ hidden).to(wide)


def _gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    upstream: torch.Tensor,
    loss: _Loss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses (rows,), dhidden, dweight and dbias, given the upstream gradient of each row's loss; the last two in
    float32, in which a sum over many rows is neither too large nor too small for its dtype."""
    wide = accumulation_dtype(hidden.dtype)
    losses, dhidden = [], []
    dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    dbias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device)
    for span, part, logits in _chunks(hidden, weight, bias):
        chunk_losses, dlogits = _losses_and_gradient(logits, targets[span], upstream[span], loss)
        assert dlogits is not None
        losses.append(chunk_losses)
        dhidden.append(dlogits @ weight)
        dweight += _weight_gradient(dlogits, part, wide)
        if bias is not None:
            dbias += dlogits.to(wide).sum(0)
    if not losses:  # no rows
        losses, dhidden = [upstream.new_zeros(0)], [torch.zeros_like(hidden)]
    return torch.cat(losses), torch.cat(dhidden), dweight, dbias if bias is not None else None


def _refuse_double_backward() -> None:
    """Raise where the gradient is to be differentiated again, which would silently miss what the chunks computed."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy computes its gradients in chunks and has no second derivatives: for those, compute "
            "the same from plain PyTorch operations"
        )


class _Total(torch.autograd.Function):
    """Σ losses; the gradients are computed with it, up to the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, bias: Any, loss: _Loss) -> torch.Tensor:
        if not any(ctx.needs_input_grad):
            return _losses(hidden, weight, targets, bias, loss).sum()
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        upstream = torch.ones((), dtype=accumulation_dtype(hidden.dtype), device=hidden.device).expand(targets.shape)
        losses, dhidden, dweight, dbias = _gradients(hidden, weight, targets, bias, upstream, loss)
        ctx.save_for_backward(dhidden, dweight, dbias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_double_backward()
        # Not in place: a second backward through the same graph must find the gradients as they were.
        dhidden, dweight, dbias = (
            (gradient * upstream).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dhidden, dweight, None, dbias, None


class _Rows(torch.autograd.Function):
    """The loss of each row; the backward pass computes the logits again, with the upstream gradient of each row."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, bias: Any, loss: _Loss) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, targets, bias)
        ctx.loss = loss
        return _losses(hidden, weight, targets, bias, loss)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_double_backward()
        hidden, weight, targets, bias = ctx.saved_tensors
        _, dhidden, dweight, dbias = _gradients(hidden, weight, targets, bias, upstream, ctx.loss)
        return dhidden, dweight.to(weight.dtype), None, dbias.to(bias.dtype) if dbias is not None else None, None


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, loss: _Loss
) -> torch.Tensor:
    """Losses (rows,) without gradients."""
    losses = [
        _losses_and_gradient(logits, targets[span], None, loss)[0] for span, _, logits in _chunks(hidden, weight, bias)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=accumulation_dtype(hidden.dtype))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def head(count: int, width: int, classes: int) -> dict[str, torch.Tensor]:
        return {
            "hidden": torch.randn(count, width, device=device).to(dtype),
            "weight": (torch.randn(classes, width, device=device) / width**0.5).to(dtype),
            "targets": torch.randint(classes, (count,), device=device),
        }

    yield Sample("3x16x50", head(3, 16, 50))
    yield Sample("three rows", head(3, 16, 50), {"reduction": "sum"})
    ignored = head(7, 16, 33)
    ignored["targets"][::2] = -100
    yield Sample("ignored rows", ignored)
    yield Sample("none", {**ignored}, {"reduction": "none"})
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0}
    biased = head(5, 8, 65)
    biased["bias"] = torch.randn(65, device=device).to(dtype)
    yield Sample("all options and bias", biased, options)
    batched = head(6, 16, 40)
    yield Sample(
        "batched", {**batched, "hidden": batched["hidden"].view(2, 3, 16), "targets": batched["targets"].view(2, 3)}
    )


def _audit_samples(dtype: torch.dtype) -> Iterator[Sample]:
    # The Triton kernels that run are those of cross_entropy, on chunks; one small shape shows that they are launched.
    hidden, weight = torch.zeros(128, 64, dtype=dtype), torch.zeros(32000, 64, dtype=dtype)
    yield Sample("128x64x32000", {"hidden": hidden, "weight": weight, "targets": torch.zeros(128, dtype=torch.int64)})


SPEC = OpSpec(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    flops=lambda sample: 2 * sample.tensors["hidden"].numel() * sample.tensors["weight"].shape[0],
    compulsory_bytes=lambda sample: sample.nbytes("hidden", "weight", "bias", "targets"),
    strided=("hidden",),
    tables=CROSS_ENTROPY.tables,
)
