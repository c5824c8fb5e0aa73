"""Norms and gated MLPs of a model of `transformers`, recognised by what they compute.

Each recogniser runs the module's own forward on a few random float32 numbers on the CPU, with random weights or with
its sub-layers stood in for, next to the reference of each kernel that it might be. The model's own weights are neither
read nor moved, so that the size of the model, its dtype, its device and quantisation do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.kernels.geglu import geglu
from tilewright.kernels.huggingface.probing import (
    Unsuited,
    both_modes,
    equal,
    one_argument,
    result_of,
    standing_in,
)
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.layer_norm import reference as layer_norm_reference
from tilewright.kernels.rms_norm import reference as rms_norm_reference
from tilewright.kernels.rms_norm import rms_norm
from tilewright.kernels.swiglu import swiglu

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
# (projections of the input, projection of the result), as the families name them.
_GATED_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("gate_up_proj",), "down_proj"),
)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is worth asking about: a leaf that calls itself a norm of rows."""
    name = type(module).__name__.lower()
    return "norm" in name and not any(kind in name for kind in ("batch", "group", "instance")) and _is_leaf(module)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


class Norm(NamedTuple):
    """Which norm a module computes: whether with a mean, the name of its epsilon, and what is added to its weight."""

    centred: bool
    eps_name: str
    weight_offset: float


def norm_of(module: nn.Module) -> Norm:
    """Which of our norms the module computes.

    Raises:
        Unsuited: neither `rms_norm` nor `layer_norm`.
    """
    parameters = dict(module.named_parameters())
    if set(parameters) - {"weight", "bias"} or any(p.ndim != 1 for p in parameters.values()):
        raise Unsuited("has other parameters than one weight and one bias along the last dimension")
    if next(module.buffers(), None) is not None:
        raise Unsuited("keeps statistics in buffers")
    eps_name = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    if eps_name is None:
        raise Unsuited(f"has no epsilon under one of the names {', '.join(_EPS_NAMES)}")
    one_argument(module)
    shape = getattr(module, "normalized_shape", (8,))
    width = next((p.numel() for p in parameters.values()), shape[-1] if isinstance(shape, tuple) else 8)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(width, generator=generator) for name in parameters}
    # Rows of size 1, and small ones, where epsilon counts.
    x = torch.randn(2, 3, width, generator=generator) * torch.tensor([1.0, 0.1, 1e-3])[:, None]
    theirs = result_of(lambda: torch.func.functional_call(module, weights, (x,)))
    eps, weight, bias = getattr(module, eps_name), weights.get("weight"), weights.get("bias")
    if bias is None:
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            if equal(theirs, rms_norm_reference(x, weight, eps=eps, weight_offset=offset)):
                return Norm(False, eps_name, offset)
    if equal(theirs, layer_norm_reference(x, weight, bias, eps=eps)):
        return Norm(True, eps_name, 0.0)
    raise Unsuited("gives other numbers than rms_norm and layer_norm")


def norm_forward(module: nn.Module) -> tuple[Callable[..., torch.Tensor], str]:
    """A forward for a norm and the call it makes.

    Raises:
        Unsuited: it computes something else than `rms_norm` and `layer_norm`.
    """
    norm = norm_of(module)
    if norm.centred:
        return _layer_norm_forward(type(module), norm.eps_name), "layer_norm"
    by = f"rms_norm(weight_offset={norm.weight_offset})" if norm.weight_offset else "rms_norm"
    return _rms_norm_forward(type(module), norm.eps_name, norm.weight_offset), by


def _rms_norm_forward(kind: type[nn.Module], eps_name: str, offset: float) -> Callable[..., torch.Tensor]:
    theirs = kind.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, "weight", None)
        if weight is not None and weight.dtype != hidden_states.dtype:  # families differ in the dtype of the result
            return theirs(self, hidden_states)  # type: ignore[no-any-return]
        y = rms_norm(hidden_states, weight, eps=getattr(self, eps_name), weight_offset=offset)
        assert isinstance(y, torch.Tensor)
        return y

    return forward


def _layer_norm_forward(kind: type[nn.Module], eps_name: str) -> Callable[..., torch.Tensor]:
    theirs = kind.forward

    def forward(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
            return theirs(self, input)  # type: ignore[no-any-return]
        y = layer_norm(input, weight, bias, eps=getattr(self, eps_name))
        assert isinstance(y, torch.Tensor)
        return y

    return forward


def is_mlp(module: nn.Module) -> bool:
    """Whether the module is worth asking about: it calls itself an MLP, or has the layers of a gated one."""
    name = type(module).__name__.lower()
    called = any(word in name for word in ("mlp", "feedforward", "ffn", "experts"))
    return (called and not _is_leaf(module)) or _gated_names(module) is not None


def _gated_names(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    children = dict(module.named_children())
    return next((names for names in _GATED_NAMES if {*names[0], names[1]} <= set(children)), None)


def mlp_forward(module: nn.Module) -> tuple[Callable[..., torch.Tensor], str]:
    """A forward for a gated MLP, down(act(gate(x)) · up(x)), and the call it makes.

    Raises:
        Unsuited: it computes something else.
    """
    names = _gated_names(module)
    if names is None:
        raise Unsuited("is no gated MLP of linear layers under a name that is known")
    one_argument(module)
    inputs, output = names
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (3 * torch.randn(2, 3, 6, generator=generator) for _ in range(3))
    # The layers stood in for: any kind of linear layer will do, and no matrix product is made.
    stand_ins: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {output: lambda y: 2 * y + 1}
    if len(inputs) == 2:
        stand_ins |= {inputs[0]: lambda x: x + gate, inputs[1]: lambda x: x + up}
    else:
        stand_ins |= {inputs[0]: lambda x: torch.cat([x + gate, x + up], -1)}
    with standing_in(module, stand_ins):
        theirs = [result_of(lambda: module(x)) for _ in both_modes(module)]
    for activation, function, by in _ACTIVATIONS:
        ours = 2 * activation(x + gate) * (x + up) + 1
        if all(equal(result, ours) for result in theirs):
            return _gated_forward(inputs, output, function), by
    raise Unsuited("gives other numbers than swiglu and geglu")


def _gated_forward(
    inputs: tuple[str, ...], output: str, function: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = [getattr(self, name)(hidden_states) for name in inputs]
        result: torch.Tensor = getattr(self, output)(function(*projected))
        return result

    return forward


def _geglu_tanh(*projected: torch.Tensor) -> torch.Tensor:
    return geglu(*projected, approximate="tanh")


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: tuple[tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], str], ...] = (
    (F.silu, swiglu, "swiglu"),
    (F.gelu, geglu, "geglu"),
    (_gelu_tanh, _geglu_tanh, 'geglu(approximate="tanh")'),
)
