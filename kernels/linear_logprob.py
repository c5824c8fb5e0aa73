"""The log-probability of each target under a linear head, from hidden states, without ever holding all the logits.

    logits = hidden · weightᵀ + bias          logprob = log softmax(softcap(logits))[target] = −cross_entropy

What preference training and policy gradients are made of: DPO (arXiv:2305.18290) sums it over a response, GRPO
(arXiv:2402.03300) weighs each token's ratio of two of them. The gradient is right for any upstream gradient a token,
which the backward pass knows and the forward pass does not: it computes the logits again, chunk by chunk. See
`linear_cross_entropy`, of whose losses these are the negatives.

Shapes: hidden (…, width), weight (classes, width), bias (classes,), targets (…). The matrix products run in the
inputs' dtype, all else in float32 (float64 for float64 inputs), the results too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tilewright.kernels.cross_entropy import check_loss_options, check_targets
from tilewright.kernels.linear_chunks import head_inputs
from tilewright.kernels.linear_cross_entropy import LOSS, work_of_linear
from tilewright.kernels.linear_cross_entropy import SPEC as LINEAR_CROSS_ENTROPY
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.rows import accumulation_dtype


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """log p(target) of each row, in bounded memory.

    Under autocast the matrix products run in its dtype, as those of ``torch.nn.functional.linear``.

    Args:
        hidden: (…, width).
        weight: (classes, width), of the dtype of `hidden`; or a parameter that ``fully_shard`` has sharded.
        targets: (…) int64, classes or `ignore_index`.
        bias: (classes,).
        softcap: bounds the logits to ±softcap; None leaves them.
        ignore_index: rows with this target give 0 and take no gradient.

    Returns:
        (…) float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: an argument does not fit; on CPU also a target that is no class.
    """
    op = "linear_logprob"
    check_loss_options(op, 0.0, 0.0, softcap, "none", None)
    hidden, weight, bias = head_inputs(op, hidden, weight, bias)
    check_targets(op, targets, hidden, "hidden", weight.shape[0], ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1])
    options = (ignore_index, 0.0, 0.0, softcap or 0.0, "")
    losses: torch.Tensor = LOSS.rows(flat, weight, bias, targets.reshape(-1), *options)[0]
    return 0.0 - losses.view(targets.shape)  # and not −losses, which makes −0 of the rows that are ignored


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The same with all the logits at once."""
    z = F.linear(hidden, weight, bias).to(accumulation_dtype(hidden.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    counts = targets != ignore_index
    picked = torch.log_softmax(z, -1).gather(-1, torch.where(counts, targets, 0)[..., None])[..., 0]
    return picked.masked_fill(~counts, 0.0)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def head(count: int, width: int, classes: int) -> dict[str, torch.Tensor]:
        return {
            "hidden": torch.randn(count, width, device=device).to(dtype),
            "weight": (torch.randn(classes, width, device=device) / width**0.5).to(dtype),
            "targets": torch.randint(classes, (count,), device=device),
        }

    yield Sample("three rows", head(3, 16, 50))
    yield Sample("no rows", head(0, 16, 50))
    ignored = head(7, 8, 1000)
    ignored["targets"][::2] = 3
    ignored["bias"] = torch.randn(1000, device=device).to(dtype)
    yield Sample("all options", ignored, {"ignore_index": 3, "softcap": 2.0})
    batched = head(6, 16, 127)
    batched |= {"hidden": batched["hidden"].view(2, 3, 16), "targets": batched["targets"].view(2, 3)}
    batched["targets"][0, 1] = -100
    yield Sample("batched", batched)


def _audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
    hidden, weight = torch.zeros(128, 16, dtype=dtype), torch.zeros(128256, 16, dtype=dtype)
    tensors = {"hidden": hidden, "weight": weight, "targets": torch.zeros(128, dtype=torch.int64)}
    yield Sample("8B", tensors)


SPEC = OpSpec(
    name="linear_logprob",
    function=linear_logprob,
    reference=reference,
    samples=_samples,
    audit_samples=_audit_samples,
    work=lambda sample: work_of_linear(sample, results=4 * sample.tensors["targets"].numel()),
    strided=("hidden",),
    tables=LINEAR_CROSS_ENTROPY.tables,
)
