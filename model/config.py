"""`ModelConfig`: everything that shapes the Transformer, and the presets that families and sizes are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


class ModelConfigError(Exception):
    """A model that cannot be built: one sentence that names the setting and the mend."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer with pre-normalisation.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        kv_heads: key and value heads; divides `heads` (grouped-query attention, arXiv:2305.13245).
        head_dim: width of a head; even if positions are rotary.
        intermediate_size: inner width of the feed-forward part.
        max_sequence_length: positions that the model knows.
        norm: ``rms_norm`` or ``layer_norm``, with epsilon `norm_eps`.
        activation: ``swiglu`` (gated, arXiv:2002.05202) or ``gelu`` (tanh approximation, not gated).
        positions: ``rotary`` (arXiv:2104.09864, with base `rotary_base`) or ``learned``.
        bias: whether the linear layers have biases.
        tied_embeddings: whether the head is the embedding.
        initial_std: standard deviation of the initial weights; projections back into the residual stream take
            it divided by sqrt(2 · layers), as in GPT-2.

    Raises:
        ModelConfigError: sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_sequence_length: int
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = 10000.0
    bias: bool = False
    tied_embeddings: bool = False
    initial_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size",
            "max_sequence_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ModelConfigError(f"model.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("norm_eps", "rotary_base", "initial_std"):
            if not 0 < getattr(self, name) < 2**63:  # what the kernels take
                raise ModelConfigError(f"model.{name} is {getattr(self, name)}; it must be more than 0 and below 2**63")
        if self.heads % self.kv_heads:
            raise ModelConfigError(
                f"model.heads is {self.heads}, which model.kv_heads ({self.kv_heads}) does not divide; "
                f"choose kv_heads from the divisors of {self.heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ModelConfigError(f"model.head_dim is {self.head_dim}; rotary positions need an even one")
        if self.head_dim > 256:
            raise ModelConfigError(f"model.head_dim is {self.head_dim}; the attention kernels take up to 256")

    def matmul_parameters(self) -> int:
        """Parameters that each token meets in a matrix product: the projections, and the head even where it is tied."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.activation == "swiglu" else 2)
        return self.layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations that training requires for each token, forward and backward.

        6 per parameter in matrix products, and 12 · layers · heads · head_dim · sequence_length for the attention
        scores, the causal mask not deducted (the convention of PaLM, arXiv:2204.02311, appendix B).
        """
        return 6 * self.matmul_parameters() + 12 * self.layers * self.heads * self.head_dim * sequence_length


_LLAMA: dict[str, Any] = {"norm": "rms_norm", "activation": "swiglu", "positions": "rotary", "bias": False}
_GPT2: dict[str, Any] = {
    "norm": "layer_norm",
    "activation": "gelu",
    "positions": "learned",
    "bias": True,
    "tied_embeddings": True,
    "vocab_size": 50257,
    "max_sequence_length": 1024,
    "head_dim": 64,
}

# Published shapes: Llama 3 (arXiv:2407.21783), Mistral 7B (arXiv:2310.06825; that of its version 0.3, which has no
# window), SmolLM2 (arXiv:2502.02737), GPT-2 (Radford et al. 2019).
PRESETS: dict[str, ModelConfig] = {
    "llama-10m": ModelConfig(
        **_LLAMA, vocab_size=8192, hidden_size=320, layers=6, heads=5, kv_heads=5, head_dim=64,
        intermediate_size=864, max_sequence_length=1024, tied_embeddings=True,
    ),
    "smollm2-135m": ModelConfig(
        **_LLAMA, vocab_size=49152, hidden_size=576, layers=30, heads=9, kv_heads=3, head_dim=64,
        intermediate_size=1536, max_sequence_length=8192, rotary_base=100000.0, tied_embeddings=True,
    ),
    "llama-3.2-1b": ModelConfig(
        **_LLAMA, vocab_size=128256, hidden_size=2048, layers=16, heads=32, kv_heads=8, head_dim=64,
        intermediate_size=8192, max_sequence_length=8192, rotary_base=500000.0, tied_embeddings=True,
    ),
    "mistral-7b": ModelConfig(
        **_LLAMA, vocab_size=32768, hidden_size=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        intermediate_size=14336, max_sequence_length=32768, rotary_base=1000000.0,
    ),
    "llama-3-8b": ModelConfig(
        **_LLAMA, vocab_size=128256, hidden_size=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        intermediate_size=14336, max_sequence_length=8192, rotary_base=500000.0,
    ),
    "gpt2": ModelConfig(**_GPT2, hidden_size=768, layers=12, heads=12, kv_heads=12, intermediate_size=3072),
    "gpt2-xl": ModelConfig(**_GPT2, hidden_size=1600, layers=48, heads=25, kv_heads=25, intermediate_size=6400),
}  # fmt: skip


def from_preset(name: str, **changes: Any) -> ModelConfig:
    """The preset `name` with some fields changed.

    Raises:
        ModelConfigError: there is no such preset, or the changes do not fit together.
    """
    if name not in PRESETS:
        raise ModelConfigError(f"model.preset is {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
