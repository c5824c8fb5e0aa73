"""``attn_implementation="tilewright"``: our attention under the name by which `transformers` finds it.

Tensors come as (batch, heads, seq, head_dim) and the result goes as (batch, seq, heads, head_dim). Our kernels serve
causal and full attention, grouped queries, windows, softcaps, sinks, packed documents (from restarting position ids or
``cu_seq_lens_q``), and decoding with a growing or a sliding cache. PyTorch computes the rest, and nothing is
approximated: padding and other masks that are no rule, static caches, dropout, probabilities that are asked for
(``output_attentions``), biases on the scores, head dimensions above 256 and values of another head dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from tilewright.kernels.attention import attention
from tilewright.kernels.huggingface.masks import Rule, RuleMask, attention_mask

NAME = "tilewright"
_LARGEST_HEAD_DIM = 256
# Where `transformers` collects what `output_attentions` asks for; not every layer hands that argument on.
_COLLECTED = getattr(output_capturing, "_active_collector", None)


def register_attention() -> None:
    """Make ``attn_implementation="tilewright"`` known to `transformers`, for models built or switched after this call.

    register_attention()
    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation="tilewright")
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer, with the signature that `transformers` calls.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, head_dim); with a cache, keys go back further than queries.
        attention_mask: None, what our mask function made, or any mask that PyTorch's attention takes.
        dropout, scaling, softcap: of the probabilities, of the scores, and the bound tanh puts on them.
        sliding_window: keys that a query sees, itself included; a mask that is given already holds it.
        s_aux: one sink per head.
        kwargs: `cu_seq_lens_q` and `max_length_q` (packed documents), `position_bias`, `output_attentions`; others are
            ignored, as PyTorch's attention in `transformers` does.

    Returns:
        (batch, seq, heads, head_dim) and the probabilities, None but where `output_attentions` asks for them.
    """
    if kwargs.get("cache") is not None:  # continuous batching keeps its keys in pages, which are gathered there
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=softcap, **kwargs
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    rule = _rule(attention_mask, query, key, causal, sliding_window, kwargs)
    wants_weights = bool(kwargs.get("output_attentions")) or _are_collected(module)
    bias = kwargs.get("position_bias")
    biased = bias is not None
    if rule is not None and not (dropout or wants_weights or biased) and _fits(query, key, value):
        return _by_rule(query, key, value, rule, scaling, softcap, s_aux), None
    mask = attention_mask if rule is None else _matrix(attention_mask, rule, query, key)
    if wants_weights or (not biased and (softcap is not None or s_aux is not None)):
        return _in_full(query, key, value, mask, dropout, scaling, softcap, s_aux, bias)
    if (
        rule is not None
        and rule.causal
        and rule.window is None
        and rule.cu_seqlens is None
        and query.shape[2] == key.shape[2]
    ):
        mask = None  # a flag says it, with which PyTorch is faster
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, causal, softcap=softcap, **kwargs)


def _are_collected(module: torch.nn.Module) -> bool:
    """Whether probabilities are collected from layers that were not told so. Not in training, where a layer that is
    checkpointed would find nobody collecting when it runs again."""
    if _COLLECTED is None or getattr(module, "training", False) or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in _COLLECTED.get() or ())


def _rule(
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> Rule | None:
    """The rule of this call, or None where it is a matrix."""
    if isinstance(mask, RuleMask):
        rule = mask.rule
    elif mask is not None:
        return None
    else:
        windowed = causal and sliding_window is not None and sliding_window < key.shape[2]
        rule = Rule(causal, sliding_window if windowed else None)
    starts = kwargs.get("cu_seq_lens_q")
    if rule.cu_seqlens is None and starts is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]:
        rule = replace(rule, cu_seqlens=starts.to(torch.int32), max_seqlen=kwargs.get("max_length_q"))
    return rule


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.shape[-1] <= _LARGEST_HEAD_DIM
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        # Under autocast, which makes one dtype of them, rotated queries and keys may be wider than values.
        and (query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type))
    )


def _by_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, seq, heads, head_dim) from our kernels."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"causal": rule.causal, "scale": scaling}
    for name, option in (("window", rule.window), ("softcap", softcap), ("sinks", sinks)):
        if option is not None:
            options[name] = option
    if rule.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options |= {"cu_seqlens": rule.cu_seqlens, "max_seqlen": rule.max_seqlen}
    out = attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    return out.reshape(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def _matrix(mask: torch.Tensor | None, rule: Rule, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """What `rule` says as a matrix (batch or 1, 1, queries, keys); None where every query sees every key."""
    if isinstance(mask, RuleMask) and rule is mask.rule:
        return mask.matrix()
    queries, keys = query.shape[2], key.shape[2]
    if rule.window is None and rule.cu_seqlens is None and (not rule.causal or queries == 1):
        return None
    query_index = torch.arange(keys - queries, keys, device=query.device)[:, None]
    key_index = torch.arange(keys, device=query.device)[None, :]
    seen = key_index <= query_index if rule.causal else torch.ones_like(key_index <= query_index)
    if rule.window is not None:
        seen &= key_index > query_index - rule.window
    if rule.cu_seqlens is not None:
        document = torch.searchsorted(rule.cu_seqlens, key_index[0].to(torch.int32), right=True)
        seen &= document[:, None] == document[None, :]
    return seen[None, None]


def _in_full(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With all scores in memory, for what PyTorch's own attention does not take; the result and the probabilities."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.dtype == torch.bool:
        # The smallest number, not −∞: a row that sees nothing, at padding, stays finite, as in `transformers`.
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = weights[..., :-1] if sinks is not None else weights
    weights = F.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2), weights
