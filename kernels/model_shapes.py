"""The models and batches whose shapes the audit compiles for and the benchmarks time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class ModelShape(NamedTuple):
    """A decoder's sizes, in elements: residual width, query and key-value heads, feed-forward width, classes."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int


# GPT-2 small's widths and vocabulary (odd, so rows of logits are not aligned); Llama 3.2 1B; Llama 3 8B and 70B.
MODELS = (
    ModelShape("125M", 768, 12, 12, 64, 3072, 50257),
    ModelShape("1B", 2048, 32, 8, 64, 8192, 128256),
    ModelShape("8B", 4096, 32, 8, 128, 14336, 128256),
    ModelShape("70B", 8192, 64, 8, 128, 28672, 128256),
)

# Sequences by their length: 16,384 tokens for one GPU at 2k and 8k, 32,768 at 32k.
BATCHES = {"2k": (8, 2048), "8k": (2, 8192), "32k": (1, 32768)}

# The share of one processor where tokens are divided among about 132 (an H100's): the small size of the same launches.
_PROCESSORS = 128


def batches(small: bool) -> Iterator[tuple[str, int, int]]:
    """The sequence's name, the number of sequences and their length, in tokens; a processor's share where `small`."""
    for name, (sequences, length) in BATCHES.items():
        yield name, sequences, length // _PROCESSORS if small else length


def residual_streams(dtype: torch.dtype, small: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What a norm takes: (sequences, length, width) of each model and batch, and rows that are unaligned or wider."""
    widths = {model.name: model.width for model in MODELS}
    widths |= {f"{width:,} wide": width for width in (8191, 16384, 65536)}
    for name, width in widths.items():
        for length_name, sequences, length in batches(small):
            if length_name == "2k" or "wide" not in name:
                yield f"{name} {length_name}", torch.empty(sequences, length, width, dtype=dtype)
