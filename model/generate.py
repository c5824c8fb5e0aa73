"""Sampling a continuation, token by token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tilewright.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    stop: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` (token ids, at least one).

    Only the last `max_sequence_length` tokens are seen. The prefix is computed again for each token, which is right for
    samples of some hundred tokens and not meant for serving.

    Args:
        max_new_tokens: how many tokens to draw at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the likeliest k; None for all.
        stop: a token that ends the continuation, not included.
        seed: of the draws.

    Returns:
        The new token ids.

    Raises:
        ValueError: the prompt is empty, or temperature or top_k is negative.
    """
    if not prompt:
        raise ValueError("prompt is empty; it must hold at least one token")
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature is {temperature} and top_k {top_k}; they must be finite, at least 0 and 1")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.config.max_sequence_length :]], device=device)
        hidden = model.hidden_states(window)[0, -1]
        logits = F.linear(hidden, model.head_weight()).float().cpu()
        token = _draw(logits, temperature, top_k, generator)
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        lowest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    # The largest logit first, so that a tiny temperature overflows to −∞ and never to NaN.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
