"""float8 for the matrix products of the blocks, through torchao (arXiv:2209.05433).

In the three products of a matrix, x·Wᵀ in the forward pass and dy·W and dyᵀ·x in the backward pass, both factors are
rounded to 8 bits with a scale taken from what they hold now, and the sums are kept in more:

    ``tensorwise``   one scale for a tensor; gradients in e5m2, the rest in e4m3
    ``rowwise``      one for each row, a power of two; all in e4m3, closer to bfloat16 and slower

Embedding, head, norms and attention stay as they are, and so do the float32 masters, the optimizer, checkpoints and
what FSDP sends. No activation is kept in 8 bits: what is to be gained is time. It has not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from torch import nn

from tilewright.model import Transformer
from tilewright.trainer.errors import TrainingError

_LEAST_GENERATION = 89
_MULTIPLE = 16  # of both sizes of a factor, in the hardware's products


def check_float8(scaling: str, generation: int | None) -> None:
    """Raise before anything is built if `float8` cannot serve here.

    Args:
        scaling: what the recipe says.
        generation: of the GPU, its compute capability × 10; None where there is none.

    Raises:
        TrainingError: the GPU has no float8 products.
    """
    if scaling != "none" and (generation is None or generation < _LEAST_GENERATION):
        here = "this run has no GPU" if generation is None else f"this GPU has {generation / 10:.1f}"
        raise TrainingError(
            f"float8 is {scaling!r}, which takes a GPU of compute capability 8.9 or more, such as an H100, and {here}; "
            "set float8 to none"
        )


def check_torchao(scaling: str) -> None:
    """Raise if `float8` is asked for and torchao is not installed.

    Raises:
        TrainingError: with the command that installs it.
    """
    if scaling != "none" and importlib.util.find_spec("torchao") is None:
        raise TrainingError(
            f"float8 is {scaling!r}, which the package torchao computes, and it is not installed; install it with "
            "pip install 'tilewright[float8]', or set float8 to none"
        )


def generation_of(device: torch.device) -> int | None:
    """The compute capability × 10 of a GPU; None for another device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def use_float8(model: Transformer, scaling: str, *, emulate: bool = False) -> None:
    """Have the matrices of the blocks multiply in float8; called before they are checkpointed, compiled or sharded.

    Parameters keep their names, shapes and dtypes.

    Args:
        scaling: ``tensorwise`` or ``rowwise``; ``none`` changes nothing.
        emulate: round to float8 and multiply as before, which needs no such GPU and shows the numerics alone.

    Raises:
        TrainingError: torchao is missing, or a matrix has a size that the products do not take.
    """
    if scaling == "none":
        return
    check_torchao(scaling)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear) and any(size % _MULTIPLE for size in module.weight.shape):
            raise TrainingError(
                f"float8 is {scaling!r}, which takes matrices whose sizes {_MULTIPLE} divides, and {name}.weight is "
                f"{tuple(module.weight.shape)}; change the model's sizes, or set float8 to none"
            )
    config = replace(Float8LinearConfig.from_recipe_name(scaling), emulate=emulate)
    convert_to_float8_training(model.blocks, config=config)
