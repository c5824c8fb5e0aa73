"""What takes a recipe's steps: its model, optimizer and loss scale, put together in one place for all who take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewright.model import Transformer
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model
from tilewright.trainer.recipe import Recipe


class Built(NamedTuple):
    """Newly initialised; see `build`.

    Attributes:
        model, optimizer: sharded over the processes.
        loss_scale: of float16; None for other dtypes.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None


def build(recipe: Recipe, processes: World) -> Built:
    """The model of `recipe` as it is trained, with its optimizer.

    Raises:
        TrainingError: the recipe does not fit the processes or the device.
    """
    model = sharded_model(
        recipe.model,
        processes,
        compute_dtype=getattr(torch, recipe.compute_dtype),
        compile=recipe.compile,
        seed=recipe.seed,
        parallel=recipe.parallel,
        activation_checkpointing=recipe.activation_checkpointing,
        float8=recipe.float8,
    )
    loss_scale = LossScale(processes.device) if recipe.compute_dtype == "float16" else None
    return Built(model, build_optimizer(model, recipe.optimizer), loss_scale)
