"""Cross-entropy of a linear head, from hidden states, without ever holding all the logits.

    logits = hidden · weightᵀ + bias          loss = cross_entropy(logits, targets)

The logits of one chunk of rows exist at a time, and their gradient is written over them (the plan of Liger-Kernel's
and Apple's fused heads, arXiv:2411.09009): see `linear_chunks` for the chunks and the gradients of the head, and
`cross_entropy` for those of the logits. For the reductions "mean" and "sum" the gradients are computed along with the
loss, up to the upstream scalar. For "none" each row has an upstream gradient of its own, not known in the forward pass;
the backward pass computes the logits anew.

Shapes: hidden (…, width), weight (classes, width), bias (classes,), targets (…). The matrix products run in the
inputs' dtype, the loss in float32, and dweight and dbias are summed over the chunks in float32.

Over a process group (`vocabulary_parallel`) each rank holds V/p rows of the weight and all the hidden states; each
chunk takes two small collectives, and dhidden, of which each rank computes a summand, one at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import cross_entropy_cpu
from tilewright.kernels.cross_entropy import SPEC as CROSS_ENTROPY
from tilewright.kernels.cross_entropy import check_loss_options, check_targets, losses_and_gradient
from tilewright.kernels.cross_entropy import reference as rows_reference
from tilewright.kernels.linear_chunks import Gradients, HeadLoss, Wanted, chunk_rows, head_inputs, in_chunks, mean
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.rows import accumulation_dtype
from tilewright.kernels.vocabulary_parallel import shard_of, whole_rows


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
    return_z_loss: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``cross_entropy(linear(hidden, weight, bias), targets)`` in bounded memory.

    Under autocast the matrix products run in its dtype, as those of ``torch.nn.functional.linear``.

    Args:
        hidden: (…, width).
        weight: (classes, width), of the dtype of `hidden`. A parameter that ``fully_shard`` has sharded is gathered in
            that dtype, and gets the gradient that FSDP would give it: the mean over the processes.
        targets: (…) int64, classes or `ignore_index`.
        bias: (classes,).
        ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss: as in `cross_entropy`.
        group: the process group over which the classes are split: `weight` is (classes / ranks, width) and `bias`
            (classes / ranks,), rank r's part; hidden and targets are the same on every rank, and so is the gradient of
            hidden.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (…) for ``"none"``. With `return_z_loss` a pair of them, the
        second the z-loss term reduced alike, through which no gradient flows.

    Raises:
        ValueError: an argument does not fit; on CPU also a target that is no class.
    """
    op = "linear_cross_entropy"
    check_loss_options(op, label_smoothing, z_loss, softcap, reduction, group)
    hidden, weight, bias = head_inputs(op, hidden, weight, bias)
    check_targets(op, targets, hidden, "hidden", shard_of(group, weight.shape[0]).all_classes, ignore_index)

    flat_targets = targets.reshape(-1)
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, group.group_name if group is not None else "")
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat_targets, *options)
    if reduction == "none":
        results = tuple(result.view(targets.shape) for result in LOSS.rows(*inputs))
    else:
        # The loss of a chunk is then computed by what no compiler betters.
        opaque = group is not None or cross_entropy_cpu.serves(hidden, softcap or 0.0)
        results = LOSS.total(*inputs, opaque=opaque)
    if reduction == "mean":
        count = (flat_targets != ignore_index).sum()
        results = tuple(mean(result, count) for result in results)
    loss, z_losses = results
    return (loss, z_losses) if return_z_loss else loss


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same with all the logits at once."""
    return rows_reference(F.linear(hidden, weight, bias), targets, **options)


def _in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    group_name: str,
    upstream: torch.Tensor | None,
    wants: Wanted,
) -> tuple[tuple[torch.Tensor, torch.Tensor], Gradients]:
    """Losses and z-loss terms (rows,), and the gradients that are wanted given the upstream gradient of each row."""
    losses = torch.empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    z_losses = torch.empty_like(losses)
    group = _group_named(group_name)
    if group is not None:
        # Ranks that hold different numbers of classes would make different chunks and wait for each other.
        whole_rows("linear_cross_entropy", losses.new_empty(0, 4), weight.shape[0], group)

    def rows(span: slice, logits: torch.Tensor) -> torch.Tensor | None:
        losses[span], z_losses[span], dlogits = losses_and_gradient(
            logits,
            targets[span],
            upstream[span] if upstream is not None else None,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap or None,
            group=group,
            overwrite=True,
        )
        return dlogits

    gradients = in_chunks(hidden, weight, bias, wants, chunk_rows(weight.shape[0], hidden.device), rows)
    if group is not None and wants.hidden:
        torch.distributed.all_reduce(gradients[0], group=group)
    return (losses, z_losses), gradients


def _group_named(name: Any) -> Any:
    """The process group that an op's schema, which holds no such object, names; None for none."""
    return torch._C._distributed_c10d._resolve_process_group(name) if name else None


# `linear_logprob` is its negative.
LOSS = HeadLoss(
    "linear_cross_entropy",
    "Tensor targets, int ignore_index, float label_smoothing, float z_loss, float softcap, str group",
    _in_chunks,
    results=2,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def head(count: int, width: int, classes: int) -> dict[str, torch.Tensor]:
        return {
            "hidden": torch.randn(count, width, device=device).to(dtype),
            "weight": (torch.randn(classes, width, device=device) / width**0.5).to(dtype),
            "targets": torch.randint(classes, (count,), device=device),
        }

    yield Sample("3x16x50", head(3, 16, 50))
    yield Sample("three rows", head(3, 16, 50), {"reduction": "sum"})
    yield Sample("no rows", head(0, 16, 50), {"reduction": "sum"})
    yield Sample("one class", head(2, 4, 1), {"z_loss": 1e-2})
    ignored = head(7, 16, 33)
    ignored["targets"][::2] = -100
    yield Sample("ignored rows", ignored)
    yield Sample("none", {**ignored}, {"reduction": "none"})
    ignored = head(5, 16, 33)
    ignored["targets"][1:3] = 7
    yield Sample("ignore index 7", ignored, {"ignore_index": 7, "reduction": "sum"})
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0, "return_z_loss": True}
    for reduction in ("mean", "none"):
        biased = head(5, 8, 65)
        biased["targets"][3] = -100
        biased["bias"] = torch.randn(65, device=device).to(dtype)
        yield Sample(f"all options and bias, {reduction}", biased, {**options, "reduction": reduction})
    batched = head(6, 16, 40)
    batched |= {"hidden": batched["hidden"].view(2, 3, 16), "targets": batched["targets"].view(2, 3)}
    yield Sample("batched", batched)
    transposed = head(4, 16, 127)
    transposed |= {
        "weight": transposed["weight"].t().contiguous().t(),
        "hidden": transposed["hidden"][:1].expand(4, 16),
    }
    yield Sample("transposed weight, expanded hidden", transposed)


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    # The matrix products are PyTorch's, and the Triton kernels those of cross_entropy, on chunks; a small width shows
    # that they are launched. The sum computes its gradient in the forward pass, the rows in a backward pass.
    targets = torch.zeros(128, dtype=torch.int64)
    for name, classes in {"125M": 50257, "8B": 128256, "262,144 classes": 262144}.items():
        for reduction in ("sum", "none"):
            hidden, weight = torch.zeros(128, 16, dtype=dtype), torch.zeros(classes, 16, dtype=dtype)
            tensors = {"hidden": hidden, "weight": weight, "targets": targets}
            yield Sample(f"{name}, {reduction}", tensors, {"reduction": reduction})


def work_of_linear(sample: Sample, results: int) -> Passes:
    """One matrix product forward and two backward; operands in, `results` bytes out, and the operands' gradients."""
    products = 2 * sample.tensors["hidden"].numel() * sample.tensors["weight"].shape[0]
    operands = sample.nbytes("hidden", "weight", "bias")
    return Passes(
        Work(products, operands + sample.nbytes("targets") + results),
        Work(2 * products, 2 * operands + sample.nbytes("targets")),
        common=Work(0, operands + sample.nbytes("targets")),
    )


SPEC = OpSpec(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=lambda sample: work_of_linear(sample, results=4),
    strided=("hidden",),
    tables=CROSS_ENTROPY.tables,
)
