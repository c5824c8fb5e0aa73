"""What the processes send one another in `train_step`, by formula: to size a job before it runs, and to hold FSDP to.

With P parameters in groups (each block one, all the rest another), N processes that share one model, R replicas of it,
and A micro-batches a step, each process takes part in these collectives:

    all-gather        A · (groups, and the blocks once more where they are freed after the forward pass)
    reduce-scatter    A · groups where gradients are reduced after every micro-batch, groups where after the last
    all-reduce        groups where R > 1, of gradients; and 2 of float64: valid tokens, then loss and squared norms

A group's parameters are padded to a multiple of N rows. Gathered are `compute_dtype`'s bytes, reduced are float32's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewright.model import Transformer
from tilewright.model.config import ModelConfig
from tilewright.trainer.recipe import Parallel
from tilewright.trainer.step import place_of


@dataclass(frozen=True)
class Volume:
    """`count` collectives of a kind, and the bytes of the larger of each one's two sides: what it would take whole."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """The collectives of one optimizer step, as each process takes part in them."""

    all_gather: Volume
    reduce_scatter: Volume
    all_reduce: Volume


def step_traffic(
    config: ModelConfig, parallel: Parallel, *, world_size: int, micro_batches: int, compute_dtype: torch.dtype
) -> Traffic:
    """The collectives of a step of `micro_batches` a process over `world_size` processes."""
    shards = world_size // parallel.replicas
    with torch.device("meta"):
        model = Transformer(config)
    in_blocks = [list(block.parameters()) for block in model.blocks]
    own = {parameter for parameters in in_blocks for parameter in parameters}
    rest = [parameter for parameter in model.parameters() if parameter not in own]
    blocks = [_padded(parameters, shards) for parameters in in_blocks]
    groups = [*blocks, _padded(rest, shards)]
    gathered = groups + (blocks if parallel.reshard_after_forward and shards > 1 else [])
    reductions = micro_batches if parallel.reduce == "every" else 1
    wide = torch.float32.itemsize
    between_replicas = [elements // shards for elements in groups] if parallel.replicas > 1 else []
    # Valid tokens; the loss with the gradient's squared norm at each place.
    sums = 1 + 1 + len({place_of(name) for name, _ in model.named_parameters()})
    # Two processes or more: FSDP leaves the collectives of a single one out.
    alone = shards == 1
    return Traffic(
        all_gather=_volume([] if alone else gathered * micro_batches, compute_dtype.itemsize),
        reduce_scatter=_volume([] if alone else groups * reductions, wide),
        all_reduce=Volume(len(between_replicas) + 2, sum(between_replicas) * wide + sums * torch.float64.itemsize),
    )


def _padded(parameters: list[torch.nn.Parameter], shards: int) -> int:
    """Elements of a group, each parameter's rows padded to a multiple of `shards`."""
    return sum(-(-p.shape[0] // shards) * shards * p[0].numel() for p in parameters)


def _volume(elements: list[int], itemsize: int) -> Volume:
    return Volume(len(elements), sum(elements) * itemsize)
