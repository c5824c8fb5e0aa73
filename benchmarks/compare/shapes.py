"""The models that are compared: one line each."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A LLaMA-style model with tied embeddings, and the batch of one step: `sequences` of `length` tokens."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    length: int
    sequences: int


SHAPES = {
    "42M": Shape(32000, 512, 8, 8, 1408, 512, 4),
    "42M, 8,192 tokens": Shape(8192, 512, 4, 8, 1408, 8192, 1),
    "131,072 classes": Shape(131072, 512, 4, 8, 1408, 1024, 4),
}
