"""Initial values of the parameters: the same numbers however the model is sharded.

Each row of a parameter is drawn by a generator seeded with (seed, the parameter's name, a block of rows), so a process
draws only the blocks that it holds, and one process or a thousand start from the same model.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tilewright.model.transformer import Transformer

# Rows drawn by one generator: coarse enough that seeding costs nothing, fine enough that a shard draws little too much.
_BLOCK_ROWS = 64


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter and the rotary tables of a model that has memory; plain parameters or sharded along rows.

    Matrices are normal with `initial_std`, those that project back into the residual stream with
    initial_std / sqrt(2 · layers); norms are 1, biases 0.
    """
    model.fill_rotary_tables()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local, first = _local_rows(parameter)
            if parameter.ndim == 1:
                local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                _draw(local, first, _std(model, name), f"{seed}/{name}")


def _std(model: Transformer, name: str) -> float:
    residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    return model.config.initial_std / (math.sqrt(2 * model.config.layers) if residual else 1.0)


def _local_rows(parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
    """This process's rows of `parameter`, and the index of the first of them."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    local = parameter.to_local()
    first = 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are sharded along their first dimension"
            # As torch.chunk divides: every process but the last ones holds ceil(rows / processes).
            per_process = -(-parameter.shape[0] // parameter.device_mesh.size(dimension))
            coordinate = parameter.device_mesh.get_coordinate()
            assert coordinate is not None
            first = coordinate[dimension] * per_process
    return local, first


def _draw(local: torch.Tensor, first: int, std: float, key: str) -> None:
    """Fill rows [first, first + len(local)) of the parameter `key` with normal numbers."""
    last = first + local.shape[0]
    for start in range(first // _BLOCK_ROWS * _BLOCK_ROWS, last, _BLOCK_ROWS):
        generator = torch.Generator().manual_seed(_seed_of(f"{key}/{start}"))
        block = torch.empty(_BLOCK_ROWS, *local.shape[1:]).normal_(0.0, std, generator=generator)
        low, high = max(start, first), min(start + _BLOCK_ROWS, last)
        local[low - first : high - first] = block[low - start : high - start].to(local)


def _seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
