"""What plain PyTorch takes the place of each kernel in a training step, and where there is nothing to replace.

The model calls its kernels by the names that `tilewright.model.transformer` imports; a replacement puts another
function there for the length of a ``with`` block. In compiled blocks Dynamo sees that the name stands for something
else and compiles them again, with the replacement fused as far as Inductor can.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from tilewright.benchmarks.training.workload import Workload, memory_bytes
from tilewright.kernels import AdamW, adamw_cpu
from tilewright.kernels.opspec import OpSpec
from tilewright.kernels.registry import SPECS
from tilewright.model import ModelConfig, Transformer, initialise, transformer
from tilewright.trainer.recipe import Recipe

_RowAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]


class Replacement(NamedTuple):
    """One kernel out of the step: `within` its context, `by` runs instead."""

    kernel: str
    by: str
    within: Callable[[], AbstractContextManager[Any]]


class Untouched(NamedTuple):
    """A kernel of the step that there is nothing to replace by, and why."""

    kernel: str
    why: str


def replacements(workload: Workload) -> tuple[list[Replacement], list[Untouched]]:
    """Each kernel of the workload's step with what can replace it, at the end all of them at once."""
    recipe, device = workload.recipe, workload.world.device
    dtype = getattr(torch, recipe.compute_dtype)
    found: list[Replacement] = []
    untouched: list[Untouched] = []
    for kernel, ends_in_reference in kernels_called(recipe.model, device, dtype, recipe.data.across_documents).items():
        if kernel == "attention":
            # Its reference is PyTorch's own document by document, which a compiled step cannot follow on a GPU; these
            # are what a plain model does.
            by = "F.scaled_dot_product_attention with a mask"
            found.append(Replacement(kernel, by, _in_model(kernel, masked_sdpa)))
            lacking = _memory_lacking_for_scores(recipe, device)
            if lacking:
                untouched.append(Untouched(kernel, lacking))
            else:
                by = "softmax over the matrix of scores"
                found.append(Replacement(kernel, by, _in_model(kernel, textbook_attention)))
        elif ends_in_reference:
            untouched.append(Untouched(kernel, f"its reference runs on {device.type}: nothing to buy"))
        else:
            plain = _called_by_the_model()[kernel].reference
            found.append(Replacement(kernel, "its reference", _in_model(kernel, plain)))
    optimizer = _optimizer_replacement(workload.optimizer)
    if isinstance(optimizer, Untouched):
        untouched.append(optimizer)
    else:
        found.append(optimizer)
    return [*found, _all_of(found)], untouched


def kernels_called(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, across_documents: bool = False
) -> dict[str, bool]:
    """The kernels that a model of `config` calls, in order, and whether the call ends in the kernel's reference itself.

    Found out by a forward pass of the smallest model of that kind on the device, not from what the config should mean.
    """
    smallest = dataclasses.replace(
        config, vocab_size=16, hidden_size=16, layers=1, heads=1, kv_heads=1, head_dim=16, intermediate_size=16,
        max_sequence_length=16,
    )  # fmt: skip
    with torch.device(device):
        model = Transformer(smallest)
        initialise(model, 0)
        ids = torch.zeros(1, 16, dtype=torch.int64)
        segments = None if across_documents else torch.tensor([0, 8, 16], dtype=torch.int32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    called: list[str] = []
    ended: list[str] = []

    def noted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for name, spec in _called_by_the_model().items():
            stack.enter_context(patch.object(transformer, name, noted(spec.function, name, called)))
            # Its module, where the public function looks the reference up.
            module, reference = sys.modules[spec.reference.__module__], spec.reference
            stack.enter_context(patch.object(module, reference.__name__, noted(reference, name, ended)))
        model(ids, ids, segments)
    return {name: name in ended for name in called}


def _called_by_the_model() -> dict[str, OpSpec]:
    """The ops under whose names the model's source calls them."""
    return {spec.name: spec for spec in SPECS if vars(transformer).get(spec.name) is spec.function}


def _in_model(kernel: str, function: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(transformer, kernel, function)


def _all_of(replaced: list[Replacement]) -> Replacement:
    """The first replacement of each kernel, all at once."""
    first: dict[str, Replacement] = {}
    for replacement in replaced:
        first.setdefault(replacement.kernel, replacement)

    @contextmanager
    def within() -> Iterator[None]:
        with ExitStack() as stack:
            for replacement in first.values():
                stack.enter_context(replacement.within())
            yield

    return Replacement("all of these", "the first of each", within)


def _optimizer_replacement(optimizer: torch.optim.Optimizer) -> Replacement | Untouched:
    """AdamW one tensor and one operation at a time, on the same state."""
    if isinstance(optimizer, torch.optim.AdamW):
        fused = bool(optimizer.param_groups[0]["fused"])
        now = "torch.optim.AdamW(fused=True)" if fused else "torch.optim.AdamW"
        options: dict[str, Any] = {"fused": False, "foreach": False}
    elif isinstance(optimizer, AdamW):
        group = optimizer.param_groups[0]
        parameter = group["params"][0]
        compiled = group["implementation"] == "auto" and group["state_dtype"] != parameter.dtype
        compiled = compiled and adamw_cpu.is_compiled()
        if optimizer.choose(parameter).implementation == "reference" and not compiled:
            return Untouched("adamw", f"its reference runs on {parameter.device.type}: nothing to buy")
        now, options = "tilewright.kernels.AdamW", {"implementation": "reference"}
    else:
        return Untouched("adamw", f"the optimizer is {type(optimizer).__name__}, which there is no plain version of")

    @contextmanager
    def within() -> Iterator[None]:
        before = [{name: group[name] for name in options} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.update(options)
        # Unless fused, PyTorch's AdamW takes no word of an overflow from the device.
        scales = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = scales and options.get("fused", True)
        try:
            yield
        finally:
            optimizer._step_supports_amp_scaling = scales
            for group, kept in zip(optimizer.param_groups, before, strict=True):
                group.update(kept)

    return Replacement("adamw", f"a loop over the tensors (now {now})", within)


def _on_rows(attend: _RowAttention) -> Callable[..., torch.Tensor]:
    """`attend` in place of `tilewright.kernels.attention`, on q, k, v (rows, heads, seq, head_dim) and a mask.

    Packed tokens become rows of `max_seqlen`, as the model gives it: no document crosses from one row into the next.
    The mask (rows, 1, seq, seq) says which keys each query sees; there is none where there are no documents.
    """

    @functools.wraps(attend)
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = True,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        shape, mask = q.shape, None
        if cu_seqlens is not None:
            tokens = q.shape[0]
            seq = max_seqlen if max_seqlen and tokens % max_seqlen == 0 else tokens
            places = torch.arange(tokens, device=q.device, dtype=cu_seqlens.dtype)
            document = torch.searchsorted(cu_seqlens, places, right=True).view(-1, 1, seq)
            mask = document[..., None] == document[..., None, :]
            mask = mask.tril() if causal else mask
            q, k, v = (x.view(-1, seq, *x.shape[1:]) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, mask, causal).transpose(1, 2).reshape(shape)

    return attention


@_on_rows
def masked_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """`tilewright.kernels.attention` by PyTorch's own, the documents kept apart by a mask."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


@_on_rows
def textbook_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """The same as softmax(q · kᵀ) · v with the whole matrix of scores, the softmax in float32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _memory_lacking_for_scores(recipe: Recipe, device: torch.device) -> str:
    """Why what textbook attention keeps for its backward pass would not fit, as a sentence; empty where it does."""
    scores = recipe.batch.micro_batch * recipe.model.layers * recipe.model.heads * recipe.data.sequence_length**2
    # The softmax in float32 and in the compute dtype.
    needed = scores * (4 + getattr(torch, recipe.compute_dtype).itemsize)
    there = memory_bytes(device)
    if needed < there // 2:
        return ""
    return (
        f"softmax over the matrix of scores was not run: it keeps {needed / 1e9:.0f} GB, more than half of the "
        f"{there / 1e9:.0f} GB here"
    )
