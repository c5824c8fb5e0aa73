"""The optimizer: AdamW over two groups, matrices with weight decay and everything else without."""

from __future__ import annotations

import torch
from torch import nn

from tilewright.trainer.recipe import Optimizer


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW whose state exists from the start, so that a checkpoint has somewhere to load into.

    Norm weights, biases and embeddings are not decayed.
    """
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # What AdamW itself would make at its first step.
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` in the next step of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
