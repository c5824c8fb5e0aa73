"""What compiled blocks keep for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.model import Transformer, initialise
from tilewright.model.config import ModelConfig
from tilewright.trainer.parallel.activations import checkpoint_activations, recomputed_flops_per_token
from tilewright.trainer.recipe import ActivationCheckpointing


def kept_bytes_and_gradients(selective: bool) -> tuple[int, list[torch.Tensor]]:
    torch._dynamo.reset()
    sizes = {"hidden_size": 64, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 32, "intermediate_size": 192}
    model = Transformer(ModelConfig(vocab_size=64, max_sequence_length=32, **sizes))
    initialise(model, seed=0)
    (block,) = model.blocks
    recipe = ActivationCheckpointing(mode="selective" if selective else "none")
    checkpoint_activations([block], recipe, compiled=True, device_type="cpu")
    block.compile(fullgraph=True)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = block(x, model.cos[:32], model.sin[:32], None)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
    return sum(size for place, size in kept.items() if place not in parameters), list(gradients)


def test_a_compiled_block_keeps_less_and_gives_the_same_gradients() -> None:
    everything, expected = kept_bytes_and_gradients(False)
    products, gradients = kept_bytes_and_gradients(True)
    assert products < 0.8 * everything
    torch.testing.assert_close(gradients, expected)


class CountedFlops(TorchDispatchMode):
    """Floating-point operations of matrix products and of attention, which is counted by its shape as it is called."""

    def __init__(self, attention_flops: int) -> None:
        super().__init__()
        self.flops, self._attention = 0, attention_flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("aten.mm"):
            (rows, inner), (_, columns) = args[0].shape, args[1].shape
            self.flops += 2 * rows * inner * columns
        elif "attention" in name:
            self.flops += self._attention * (1 if "backward" not in name else 2)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "keep"),
    [
        ("none", []),
        ("full", []),
        ("selective", ["matmul", "attention"]),
        ("selective", ["matmul"]),
        ("selective", ["attention"]),
        ("selective", ["rms_norm"]),
    ],
)
def test_the_flops_that_are_said_to_be_computed_again_are_those_that_are(mode: str, keep: list[str]) -> None:
    sizes = {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 48}
    config, rows, length = ModelConfig(vocab_size=64, max_sequence_length=16, **sizes), 2, 16
    of_attention = 4 * rows * length * length * config.heads * config.head_dim

    def step_flops(recipe: ActivationCheckpointing) -> int:
        model = Transformer(config)
        initialise(model, seed=0)
        checkpoint_activations(model.blocks, recipe, compiled=False, device_type="cpu")
        tokens = torch.arange(rows * length).reshape(rows, length)
        with CountedFlops(of_attention) as counted:
            model(tokens, tokens, None).backward()
        return counted.flops

    recipe = ActivationCheckpointing(mode=mode, keep=keep)
    again = recomputed_flops_per_token(recipe, config, length, compiled=False, device_type="cpu")
    more = step_flops(recipe) - step_flops(ActivationCheckpointing(mode="none"))
    assert again is not None
    assert rows * length * again == more
    assert (again > 0) == (keep != ["matmul", "attention"] and mode != "none")


def test_what_the_compiler_computes_again_within_a_budget_is_not_known() -> None:
    sizes = {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 48}
    config = ModelConfig(vocab_size=64, max_sequence_length=16, **sizes)

    def again(**recipe: object) -> int | None:
        return recomputed_flops_per_token(
            ActivationCheckpointing(**recipe), config, 16, compiled=True, device_type="cuda"
        )

    assert again(mode="budget", budget=0.5) is None
    assert again(mode="budget", budget=1.0) == 0
    assert again(mode="auto") == 0
