"""What test_muon.py starts on four processes: Muon's weights after some steps, and what was sent for them.

The same batch on every process makes the mean of their gradients the gradient of one, whatever the layout.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tilewright.model import ModelConfig, Transformer, from_preset
from tilewright.trainer.checkpoints.checkpoint import CheckpointWriter, training_state
from tilewright.trainer.optimization.averaging import WeightAverage
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.recipe import Checkpoints, Optimizer, Parallel

STEPS = 3
DECAY = 0.5
# No height divides by 4, nor the heights of queries, keys, values, gate and up; of 5 rows one of 4 processes has none.
CONFIGS = {
    "ragged": from_preset(
        "llama-10m", vocab_size=23, hidden_size=18, layers=2, heads=3, kv_heads=1, head_dim=6, intermediate_size=25,
        max_sequence_length=8, initial_std=0.2,
    ),
    "fewer rows than processes": from_preset(
        "gpt2", vocab_size=23, hidden_size=5, layers=1, heads=1, kv_heads=1, head_dim=5, intermediate_size=3,
        max_sequence_length=8, initial_std=0.2,
    ),
}  # fmt: skip
MUON = Optimizer(learning_rate=2e-2, kind="muon", orthogonalisation_dtype="float32", weight_decay=0.2)
COARSE = Optimizer(learning_rate=2e-2, kind="muon", weight_decay=0.2)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(23, (2, 8), generator=generator) for _ in range(2))
    return inputs, targets


def step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    inputs, targets = batch()
    (model(inputs, targets) / targets.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(
    config: ModelConfig, processes: World, replicas: int = 1, recipe: Optimizer = MUON
) -> tuple[Transformer, torch.optim.Optimizer, WeightAverage]:
    """A model after `STEPS` steps, its optimizer and the average of its weights."""
    parallel = Parallel(replicas=replicas)
    model = sharded_model(config, processes, compute_dtype=torch.float32, compile=False, seed=1, parallel=parallel)
    optimizer, average = build_optimizer(model, recipe), WeightAverage(model, DECAY)
    for number in range(STEPS):
        step(model, optimizer)
        average.update(number + 1)
    return model, optimizer, average


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


class AllToAll:
    """Counts the all-to-alls, and the elements that this process puts in, its own share included."""

    def __init__(self) -> None:
        self.calls = self.elements = 0
        self._collective = dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(self, received: torch.Tensor, sent: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.elements += sent.numel()
        return self._collective(received, sent, *arguments, **options)


def main(folder: Path) -> None:
    found: dict[str, dict[str, torch.Tensor]] = {}
    with world() as processes:
        for name, config in CONFIGS.items():
            found[f"{name}, 4"] = weights(trained(config, processes)[0])
        # Two and two, each pair for itself.
        pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"]
        pair = World(pairs.get_local_rank(), 2, processes.device, pairs)
        found["ragged, 2"] = weights(trained(CONFIGS["ragged"], pair)[0])
        found["ragged, 4, in bfloat16"] = weights(trained(CONFIGS["ragged"], processes, recipe=COARSE)[0])
        found["ragged, 2 x 2"] = weights(trained(CONFIGS["ragged"], processes, replicas=2)[0])

        model, optimizer, average = trained(CONFIGS["ragged"], processes)
        state = training_state(model, optimizer) | average.state()
        with CheckpointWriter(folder, processes, Checkpoints()) as writer:
            writer.save(state, STEPS)
            writer.wait()
        exchange = AllToAll()
        step(model, optimizer)
        found["ragged, 4, a step later"] = weights(model)
        sent = [exchange.calls, *processes.sum(*(exchange.elements * (processes.rank == n) for n in range(4)))]
        found["sent"] = {"in a step": torch.tensor(sent)}
        if processes.first:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
