"""One decoder-only Transformer for all families: pre-normalisation, fused projections, the loss computed inside.

    hidden = embedding(tokens)
    for each block:  hidden += attention(norm(hidden));  hidden += mlp(norm(hidden))
    loss = linear_cross_entropy(norm(hidden), head)

All the work between the matrix products is done by `tilewright.kernels`. The model knows nothing of how it is sharded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.kernels import attention, layer_norm, linear_cross_entropy, rms_norm, rotary, rotary_tables, swiglu
from tilewright.model.config import ModelConfig


class Norm(nn.Module):
    """RMSNorm or LayerNorm, with the residual addition before it fused in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm == "layer_norm" else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x`; given a residual, the norm of x + residual, and that sum."""
        if self.bias is None:
            return rms_norm(x, self.weight, eps=self.eps, residual=residual)
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class Attention(nn.Module):
    """Causal self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.split = (config.heads, config.kv_heads, config.kv_heads)
        self.head_dim = config.head_dim
        self.rotary = config.positions == "rotary"
        self.qkv = nn.Linear(config.hidden_size, sum(self.split) * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, seq, hidden_size) to the same; with `cu_seqlens` over the batch flattened, within its segments."""
        batch, seq, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq, sum(self.split), self.head_dim).split(self.split, dim=2)
        if self.rotary:
            q, k = rotary(q, k, cos, sin)
        if cu_seqlens is None:
            mixed = attention(q, k, v, causal=True)
        else:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            # No segment is longer than a row. The bound is stated, as reading the real one would wait for the device.
            mixed = attention(q, k, v, causal=True, cu_seqlens=cu_seqlens, max_seqlen=seq)
        assert isinstance(mixed, torch.Tensor)
        out: torch.Tensor = self.out(mixed.reshape(batch, seq, -1))
        return out


class MLP(nn.Module):
    """The feed-forward part: gated by SwiGLU, or GELU without a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        width = config.intermediate_size
        if self.gated:
            self.gate_up = nn.Linear(config.hidden_size, 2 * width, bias=config.bias)
        else:
            self.up = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.down = nn.Linear(width, config.hidden_size, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden_size) to the same."""
        inner = swiglu(self.gate_up(x)) if self.gated else F.gelu(self.up(x), approximate="tanh")
        down: torch.Tensor = self.down(inner)
        return down


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """The residual stream (batch, seq, hidden_size) after this block."""
        mixed = self.attention(self.attention_norm(x), cos, sin, cu_seqlens)
        normed, x = self.mlp_norm(mixed, residual=x)
        out: torch.Tensor = x + self.mlp(normed)
        return out


class Transformer(nn.Module):
    """A decoder-only language model.

    Parameters are left uninitialised: build the model on the ``meta`` device if it is to be sharded, give it memory,
    then call `tilewright.model.initialise`, which also fills the rotary tables.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The rotary angles stay float32 whatever the compute dtype: bfloat16 cannot tell late positions apart.
        rows = config.max_sequence_length if config.positions == "rotary" else 0
        shape = (rows, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(shape, dtype=torch.float32), persistent=False)

    def fill_rotary_tables(self) -> None:
        """Compute the rotary tables on the device where they now stand."""
        if self.config.positions == "rotary":
            cos, sin = rotary_tables(
                self.config.max_sequence_length,
                self.config.head_dim,
                base=self.config.rotary_base,
                device=self.cos.device,
            )
            self.cos.copy_(cos)
            self.sin.copy_(sin)

    def hidden_states(self, inputs: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """The final, normalised hidden states (batch, seq, hidden_size) of token ids `inputs` (batch, seq) int64.

        Raises:
            ValueError: the inputs are longer than the positions that the model knows.
        """
        seq = inputs.shape[1]
        if seq > self.config.max_sequence_length:
            raise ValueError(
                f"inputs have {seq} tokens; the model knows positions up to {self.config.max_sequence_length}"
            )
        x = self.embedding(inputs)
        if self.config.positions == "learned":
            x = x + self.position_embedding(_positions(inputs, cu_seqlens))
        cos, sin = self.cos[:seq], self.sin[:seq]
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        normed = self.norm(x)
        assert isinstance(normed, torch.Tensor)
        return normed

    def head_weight(self) -> torch.Tensor:
        """(vocab_size, hidden_size): the head's weight, which is the embedding's if they are tied."""
        return self.embedding.weight if self.config.tied_embeddings else self.head.weight

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy (float32 scalar, nats) of `targets` (batch, seq), −100 where there is nothing to
        predict."""
        loss = linear_cross_entropy(hidden, self.head_weight(), targets, reduction="sum")
        assert isinstance(loss, torch.Tensor)
        return loss

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The summed loss of `targets`, or without targets the logits of every position.

        Args:
            inputs: (batch, seq) int64 token ids.
            targets: (batch, seq) int64, −100 where there is nothing to predict.
            cu_seqlens: (segments + 1,) int32: where each attention segment starts in the inputs flattened to
                (batch · seq,); None lets a row attend over its whole length.

        Returns:
            A float32 scalar in nats, or logits (batch, seq, vocab_size).
        """
        hidden = self.hidden_states(inputs, cu_seqlens)
        if targets is None:
            return F.linear(hidden, self.head_weight())
        return self.loss(hidden, targets)


def _positions(inputs: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Each token's position in its segment, (batch, seq)."""
    if cu_seqlens is None:
        return torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
    flat = torch.arange(inputs.numel(), device=inputs.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, flat, right=True) - 1
    return (flat - cu_seqlens[segment]).long().view(inputs.shape)
