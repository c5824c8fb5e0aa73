"""The optimizer of a recipe: parameters in groups by rule, and what steps them.

    optimizer = build_optimizer(model, recipe.optimizer)
    set_learning_rate(optimizer, 1e-3)

Its state exists from the start, so that a checkpoint has somewhere to load into. The state of AdamW has the same names
and shapes whoever computes it and in whatever dtype, so that one implementation goes on from the checkpoint of another.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tilewright.kernels.optim import AdamW
from tilewright.model.transformer import MLP, Attention
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.optimization.muon import Muon
from tilewright.trainer.recipe import Optimizer, ParameterGroup

_Group = dict[str, Any]


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """What `recipe` asks for, over the parameters of `model`, which stand where they are to be trained.

    Raises:
        TrainingError: a rule for parameters matches none, or the implementation that is demanded cannot serve.
    """
    groups = parameter_groups(model, recipe)
    if recipe.kind == "sgd":
        return _sgd(groups, recipe)
    if recipe.kind == "adamw":
        return _adamw(groups, recipe)
    matrices = [group for group in groups if group["matrices"]]
    muon = Muon(
        matrices,
        recipe.learning_rate,
        momentum=recipe.momentum,
        dtype=getattr(torch, recipe.orthogonalisation_dtype),
        splits=_splits(model),
    )
    return Several([muon, _adamw([group for group in groups if not group["matrices"]], recipe)])


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` in the next step, times its factor in each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_factor"]


def parameter_groups(model: nn.Module, recipe: Optimizer) -> list[_Group]:
    """The parameters of `model` by what they have in common, as ``torch.optim`` takes groups.

    Each has ``params`` (with names), ``weight_decay``, ``learning_rate_factor``, and ``matrices``: whether they are the
    weight matrices of the blocks, which Muon steps. Norms, biases and embeddings are not decayed; after that
    the first of `recipe.groups` that matches a parameter's name holds for it.

    Raises:
        TrainingError: a rule holds for no parameter.
    """
    named = dict(model.named_parameters())
    rules = _rules_by_name(list(named), recipe.groups)
    groups: dict[object, _Group] = {}
    for name, parameter in named.items():
        weight_decay = recipe.weight_decay if parameter.ndim >= 2 and "embedding" not in name else 0.0
        learning_rate_factor = 1.0
        if rule := rules.get(name):
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            learning_rate_factor = rule.learning_rate_factor
        options = {
            "weight_decay": weight_decay,
            "learning_rate_factor": learning_rate_factor,
            "matrices": recipe.kind == "muon" and parameter.ndim == 2 and name.startswith("blocks."),
        }
        groups.setdefault(tuple(options.values()), {"params": [], **options})["params"].append((name, parameter))
    return list(groups.values())


def _rules_by_name(names: Sequence[str], rules: Sequence[ParameterGroup]) -> dict[str, ParameterGroup]:
    """The first rule that matches each name."""
    chosen: dict[str, ParameterGroup] = {}
    for number, rule in enumerate(rules):
        matched = [name for name in names if re.search(rule.match, name)]
        if not matched:
            near = difflib.get_close_matches(rule.match, names, 3, 0.0)
            raise TrainingError(
                f"optimizer.groups[{number}].match is {rule.match!r}, which no parameter's name matches; the nearest "
                f"are {', '.join(near)}"
            )
        free = [name for name in matched if name not in chosen]
        if not free:
            raise TrainingError(
                f"optimizer.groups[{number}].match is {rule.match!r}; every parameter that it matches, such as "
                f"{matched[0]}, is taken by an earlier rule; move it up or leave it out"
            )
        chosen.update(dict.fromkeys(free, rule))
    return chosen


def _splits(model: nn.Module) -> dict[torch.Tensor, list[int]]:
    """How many rows each matrix of a fused projection has: queries, keys, values; gate, up."""
    splits: dict[torch.Tensor, list[int]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            splits[module.qkv.weight] = [heads * module.head_dim for heads in module.split]
        elif isinstance(module, MLP) and module.gated:
            splits[module.gate_up.weight] = [module.gate_up.weight.shape[0] // 2] * 2
    return splits


def _adamw(groups: list[_Group], recipe: Optimizer) -> torch.optim.Optimizer:
    numbers: dict[str, Any] = {"lr": recipe.learning_rate, "betas": recipe.betas, "eps": recipe.eps}
    if recipe.implementation == "torch" or (recipe.implementation == "auto" and recipe.state_dtype == "float32"):
        optimizer = torch.optim.AdamW(groups, **numbers, fused=True)
        for parameter in _parameters(optimizer):
            # What AdamW itself would make at its first step.
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer
    implementation = "apex" if recipe.implementation == "apex" else "auto"
    try:
        dtype = getattr(torch, recipe.state_dtype)
        ours = AdamW(groups, **numbers, state_dtype=dtype, implementation=implementation)
        for parameter in _parameters(ours):
            ours.choose(parameter)
    except ValueError as error:
        raise TrainingError(str(error).replace("AdamW: implementation", "optimizer.implementation")) from None
    ours.initialise_state()
    if recipe.implementation == "apex":
        ours._step_supports_amp_scaling = False  # FusedAdam cannot skip a step on the device
    return ours


def _sgd(groups: list[_Group], recipe: Optimizer) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, foreach=True)
    if recipe.momentum:
        for parameter in _parameters(optimizer):
            # From zeros the first step gives what SGD itself begins with: the gradient.
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


class Several(torch.optim.Optimizer):
    """Optimizers that each step their own parameters, as one: its groups and its state are theirs.

    A checkpoint fills the tensors of `state` where they are; what replaces them is refused.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        # `found_inf` and `grad_scale` of a GradScaler then come to `step`, which hands them on.
        self._step_supports_amp_scaling = all(
            getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in optimizers
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all of them, one after another."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for optimizer in self.optimizers:
            vars(optimizer).update(scaling)
            optimizer.step()
            for name in scaling:
                delattr(optimizer, name)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not supported."""
        raise NotImplementedError("load into the tensors of `state`, as checkpoints do")
