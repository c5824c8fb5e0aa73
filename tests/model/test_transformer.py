"""The Transformer against one written out here in plain PyTorch, for both families."""

import math

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels import use
from tilewright.model import ModelConfig, Transformer, from_preset, initialise

LLAMA = from_preset(
    "llama-10m", vocab_size=50, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=40,
    max_sequence_length=64, tied_embeddings=False, initial_std=0.3,
)  # fmt: skip
GPT2 = from_preset(
    "gpt2", vocab_size=50, hidden_size=32, layers=2, heads=4, kv_heads=4, head_dim=8, intermediate_size=40,
    max_sequence_length=64, initial_std=0.3,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def built(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialise(model, seed=1)
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a forgotten one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def plain_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The textbook: one head at a time, the whole matrix of scores, complex rotations."""
    config, weights = model.config, dict(model.named_parameters())
    seq = tokens.shape[0]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config.norm == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config.norm_eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (seq, head_dim)
        half = config.head_dim // 2
        angles = torch.arange(seq)[:, None] * config.rotary_base ** (-torch.arange(half) / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=1)

    x = weights["embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["position_embedding.weight"][:seq]
    mask = torch.full((seq, seq), -torch.inf).triu(1)
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        heads = linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv").view(seq, -1, config.head_dim)
        mixed = []
        for head in range(config.heads):
            kv_head = head // (config.heads // config.kv_heads)
            q, k = heads[:, head], heads[:, config.heads + kv_head]
            v = heads[:, config.heads + config.kv_heads + kv_head]
            if config.positions == "rotary":
                q, k = rotate(q), rotate(k)
            mixed.append(torch.softmax(q @ k.T / math.sqrt(config.head_dim) + mask, dim=-1) @ v)
        x = x + linear(torch.cat(mixed, dim=1), f"{name}.attention.out")
        inner = norm(x, f"{name}.mlp_norm")
        if config.activation == "swiglu":
            gate, up = linear(inner, f"{name}.mlp.gate_up").chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(linear(inner, f"{name}.mlp.up"), approximate="tanh")
        x = x + linear(inner, f"{name}.mlp.down")
    head = weights["embedding.weight"] if config.tied_embeddings else weights["head.weight"]
    return norm(x, "norm") @ head.T


@BOTH
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_logits_are_those_of_the_textbook(config: ModelConfig, implementation: str) -> None:
    model = built(config)
    tokens = torch.randint(config.vocab_size, (2, 23))
    with use(implementation), torch.no_grad():
        logits = model(tokens)
    for row in range(2):
        torch.testing.assert_close(logits[row], plain_logits(model, tokens[row]), rtol=1e-4, atol=1e-4)


@BOTH
def test_the_loss_and_its_gradients_are_those_of_the_textbook(config: ModelConfig) -> None:
    model = built(config)
    tokens, targets = torch.randint(50, (1, 23)), torch.randint(50, (1, 23))
    targets[0, 5] = -100
    expected = F.cross_entropy(plain_logits(model, tokens[0]), targets[0], reduction="sum")
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(tokens, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


@BOTH
def test_packed_documents_do_not_see_each_other(config: ModelConfig) -> None:
    """Each document of a packed row gives the logits that it gives alone."""
    model = built(config)
    tokens = torch.randint(50, (2, 16))
    starts = torch.tensor([0, 5, 16, 20, 32], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=starts).flatten(0, 1)
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            alone = model(tokens.flatten()[None, start:end])[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-4)
        whole = model(tokens).flatten(0, 1)
    assert (packed - whole)[5:16].abs().max() > 1e-2, "without boundaries the second document must see the first"


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs have 65 tokens; the model knows positions up to 64"):
        built(LLAMA)(torch.zeros(1, 65, dtype=torch.int64))


def test_a_compiled_block_is_one_graph_with_the_same_numbers() -> None:
    model = built(LLAMA)
    tokens, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    starts = torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    expected = model(tokens, targets, starts)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(tokens, targets, starts), expected)
