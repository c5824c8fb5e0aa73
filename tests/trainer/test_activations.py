"""What compiled blocks keep for the backward pass, and what the process keeps of freed memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tilewright.model import Transformer, initialise
from tilewright.model.config import ModelConfig
from tilewright.trainer.activations import checkpoint_activations
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_stays_with_the_process() -> None:
    script = """
import torch
from tilewright.trainer.host_memory import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
{}
x = torch.ones(50_000_000)
before = resident()
del x
print(before - resident())
"""
    freed = [
        int(subprocess.run([sys.executable, "-c", script.format(call)], capture_output=True, check=True).stdout)
        for call in ("", "keep_freed_memory()")
    ]
    assert freed[0] > 150_000_000
    assert freed[1] < 10_000_000
