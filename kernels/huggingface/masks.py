"""The mask that `transformers` asks for: a rule in a few numbers where our attention has words for it, else the matrix.

A model of `transformers` builds its mask once per forward pass and hands it to every layer. For a window or for packed
documents a matrix of (queries × keys) booleans would say what one number or the documents' starts already say, and
would keep the kernels from being used. `RuleMask` carries the rule through the model's code instead. It is a tensor to
everybody: whoever slices, moves or adds it gets the true matrix, so that code which does not know it stays right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_overlay,
)


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, in the words of `tilewright.kernels.attention`, aligned at the bottom right."""

    causal: bool
    window: int | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None


class RuleMask(torch.Tensor):
    """A boolean mask (batch, 1, queries, keys), True where a query sees a key; a `Rule` until it is computed with."""

    rule: Rule
    _build: Callable[[], Any]
    _matrix: torch.Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: torch.device, rule: Rule, build: Callable[[], Any]) -> RuleMask:
        mask: RuleMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule, mask._build, mask._matrix = rule, build, None
        return mask

    def matrix(self) -> torch.Tensor:
        """The mask itself, made on first use."""
        matrix: torch.Tensor = self._build() if self._matrix is None else self._matrix
        self._matrix = matrix
        return matrix

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(RuleMask, RuleMask.matrix, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RuleMask({tuple(self.shape)}, {self.rule})"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """The mask of one forward pass, for ``AttentionMaskInterface``.

    Args:
        batch_size, q_length, kv_length: the mask's shape.
        q_offset, kv_offset: positions of the first query and the first key; a tensor comes from a static cache.
        mask_function: the rule as `transformers` composes it, a function of batch, head, query and key index.
        attention_mask: (batch, seen tokens), False at padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for a causal or for a full mask.

    Returns:
        None where every query sees all keys up to its own position (or, bidirectional, all keys); a `RuleMask` for a
        causal window and for packed documents; the matrix (batch, 1, q_length, kv_length) for all the rest: padding,
        static caches, chunks, images that see themselves, and whatever is traced by a compiler.
    """
    build = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **options,
    )
    rule = _rule(mask_function) if _aligned(q_length, kv_length, q_offset, kv_offset) else None
    if rule is None or not _all_real(attention_mask):
        return build()
    if rule.window is not None and rule.window >= kv_length:
        rule = Rule(rule.causal, None, rule.cu_seqlens, rule.max_seqlen)
    if rule.window is None and rule.cu_seqlens is None:
        may_skip = allow_is_causal_skip if rule.causal else allow_is_bidirectional_skip
        return None if may_skip else build()
    if torch.compiler.is_compiling():
        return build()
    return RuleMask((batch_size, 1, q_length, kv_length), torch.device(device), rule, build)


def _aligned(q_length: int, kv_length: int, q_offset: Any, kv_offset: int) -> bool:
    """Whether the last query stands at the last key, as `attention` takes it: so for all caches but static ones."""
    return isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length


def _all_real(padding: torch.Tensor | None) -> bool:
    """Whether no key is padding. Asked of the values, for which a GPU is waited for once per forward pass."""
    if padding is None:
        return True
    return not torch.compiler.is_compiling() and bool(padding.all())


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds."""
    assert isinstance(function, FunctionType)
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


# Each factory of `transformers` makes closures over one code object, by which its closures are known.
_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, torch.zeros(1, 1)).__code__


def _rule(mask_function: Callable[..., Any]) -> Rule | None:
    """The rule that `mask_function` is known to follow, or None."""
    if mask_function is causal_mask_function:
        return Rule(causal=True)
    if mask_function is bidirectional_mask_function:
        return Rule(causal=False)
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None
    parts = _captured(mask_function)["mask_functions"]
    match [getattr(part, "__code__", None) for part in parts]:
        case [code, _] if code is _WINDOW and parts[1] is causal_mask_function:
            return Rule(causal=True, window=_captured(parts[0])["sliding_window"])
        case [code, inner] if code is _PACKED and inner is _REMAPPED:
            # Positions count up within a document, so causality and a window mean there what they mean without packing.
            within = _rule(_captured(parts[1])["mask_function"])
            if within is not None and within.causal and within.cu_seqlens is None:
                return Rule(True, within.window, *_documents(_captured(parts[0])["packed_sequence_mask"]))
    return None


def _documents(numbers: torch.Tensor) -> tuple[torch.Tensor, int]:
    """cu_seqlens and the longest document of (batch, seq) document numbers; no document goes on in the next row."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    cu_seqlens = torch.cat([first, first.new_tensor([numbers.numel()])]).to(torch.int32)
    return cu_seqlens, int(cu_seqlens.diff().max())
