"""Rotary embeddings in the attention layers of `transformers`, alone or with the norm of each head before them.

As for norms and MLPs, what a layer computes decides, not its family: its own function, and for a norm the whole
layer with its linear layers stood in for, is run on a few random numbers next to our references.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tilewright.kernels.dispatch import use
from tilewright.kernels.huggingface.norms_and_mlps import norm_of
from tilewright.kernels.huggingface.probing import Unsuited, both_modes, equal, result_of, standing_in
from tilewright.kernels.qk_norm_rotary import qk_norm_rotary
from tilewright.kernels.rotary import reference as rotary_reference
from tilewright.kernels.rotary import rotary

_ROTATION = "apply_rotary_pos_emb"


class _Layout(NamedTuple):
    """How a family writes its tables, each angle once or twice, and which elements of a head it pairs."""

    spread: Callable[[torch.Tensor], torch.Tensor]
    gather: Callable[[torch.Tensor], torch.Tensor]
    interleaved: bool


_LAYOUTS = (
    _Layout(lambda x: torch.cat([x, x], -1), lambda x: x[..., : x.shape[-1] // 2], False),  # LLaMA and most
    _Layout(lambda x: x, lambda x: x, False),  # GPT-OSS
    _Layout(lambda x: torch.cat([x, x], -1), lambda x: x[..., : x.shape[-1] // 2], True),  # GLM
    _Layout(lambda x: x.repeat_interleave(2, -1), lambda x: x[..., ::2], True),  # Cohere
)


def has_rotary(module: nn.Module) -> bool:
    """Whether the module is an attention with rotary embeddings, by the names that it mentions."""
    forward = inspect.unwrap(type(module).forward)
    mentions = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    return "attention" in type(module).__name__.lower() and any("rotary" in name for name in mentions)


def rotary_forward(module: nn.Module) -> tuple[Callable[..., Any], str]:
    """The module's own forward, except that the function which rotates q and k is ours.

    `transformers` calls that function as a global of the family's file. Replacing the global would reach every model in
    the process; so the forward gets globals of its own, in which the one name means our function.

    Raises:
        Unsuited: the forward cannot be given other globals, or its function rotates differently.
    """
    theirs = _plain_forward(module)
    layout = _layout_of(theirs)

    def ours(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotate(rotary, layout, q, k, cos, sin, unsqueeze_dim)

    # Without the module's name, torch.compile looks globals up in this dictionary and not in the module.
    scope = {name: value for name, value in theirs.__globals__.items() if name != "__name__"} | {_ROTATION: ours}
    forward = FunctionType(theirs.__code__, scope, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    forward.__kwdefaults__ = theirs.__kwdefaults__
    forward.__doc__ = theirs.__doc__
    return forward, "rotary(interleaved=True)" if layout.interleaved else "rotary"


def _plain_forward(module: nn.Module) -> FunctionType:
    theirs = type(module).forward
    if not isinstance(theirs, FunctionType) or hasattr(theirs, "__wrapped__"):
        raise Unsuited("has a forward that is wrapped in a decorator")
    return theirs


def _layout_of(forward: FunctionType) -> _Layout:
    """How the function that `forward` rotates through reads its tables and pairs the elements of a head."""
    rotation = forward.__globals__.get(_ROTATION)
    if _ROTATION not in forward.__code__.co_names or rotation is None:
        raise Unsuited(f"does not rotate through a function {_ROTATION}")
    if list(inspect.signature(rotation).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        raise Unsuited(f"has an {_ROTATION} of other arguments than q, k, cos, sin and unsqueeze_dim")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(2, 2, 3, 8, generator=generator)
    angles = torch.randn(2, 3, 4, generator=generator)
    for layout in _LAYOUTS:
        if all(_rotates(rotation, layout, q, k, rows) for rows in (angles, angles[:1])):
            return layout
    raise Unsuited("gives other numbers than rotary")


def _rotates(
    rotation: Callable[..., Any], layout: _Layout, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor
) -> bool:
    """Whether the family's function does with tables in this layout what `rotary` does."""
    cos, sin = layout.spread(angles.cos()), layout.spread(angles.sin())
    try:
        theirs = rotation(q, k, cos, sin)
    except RuntimeError:  # tables of another width
        return False
    ours = _rotate(rotary_reference, layout, q, k, cos, sin, 1)
    return all(equal(one, other) for one, other in zip(theirs, ours, strict=True))


def _rotate(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    layout: _Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin come as (batch or 1, seq, …), a row for each token of q."""
    if heads_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    rows, seq = cos.shape[:2]
    # One table for all rows of the batch; or the rows' tables one after the other, where each token has its own place.
    places = None if rows == 1 else torch.arange(rows * seq, device=q.device).view(rows, seq)
    cos, sin = (layout.gather(table.flatten(0, 1)) for table in (cos, sin))
    if cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    q, k = function(q, k, cos=cos, sin=sin, positions=places, interleaved=layout.interleaved)
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_dim == 1 else (q, k)


_QK_NORM_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_QK_NORM_ARGUMENTS = [
    "self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"
]  # fmt: skip


def has_qk_norm(module: nn.Module) -> bool:
    """Whether the module is an attention layer that may normalise each head of q and k before it rotates it."""
    return has_rotary(module) and {name for name, _ in module.named_children()} == _QK_NORM_LAYERS


def qk_norm_rotary_forward(module: Any) -> tuple[Callable[..., Any], str]:
    """A forward for an attention layer with a norm on each head of q and k: norms and rotation in one launch.

    Here the order of the calls changes, so the forward is written anew, and compared in all that can be seen of it: the
    arguments with which it calls the cache and the attention function, in training and in evaluation, and its result.

    Raises:
        Unsuited: the layer does something else.
    """
    theirs = _plain_forward(module)
    layout = _layout_of(theirs)
    q_norm, k_norm = (norm_of(module.get_submodule(name)) for name in ("q_norm", "k_norm"))
    eps = getattr(module.q_norm, q_norm.eps_name)
    if q_norm != k_norm or q_norm.centred or eps != getattr(module.k_norm, k_norm.eps_name):
        raise Unsuited("has two kinds of norm for q and k, or another than rms_norm")
    if any(tuple(p.shape) != (module.head_dim,) for n in (module.q_norm, module.k_norm) for p in n.parameters()):
        raise Unsuited("has norms of another width than a head")
    if list(inspect.signature(theirs).parameters) != _QK_NORM_ARGUMENTS:
        raise Unsuited(f"has a forward of other arguments than {', '.join(_QK_NORM_ARGUMENTS[1:])}")
    eager, offset = theirs.__globals__.get("eager_attention_forward"), q_norm.weight_offset
    if eager is None:
        raise Unsuited("has no attention function of its own to fall back on")

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(hidden_states).view(heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        weights = (self.q_norm.weight, self.k_norm.weight)
        if any(weight.dtype != q.dtype for weight in weights):  # families differ in the dtype of the result
            return theirs(  # type: ignore[no-any-return]
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        turn = partial(qk_norm_rotary, q_weight=weights[0], k_weight=weights[1], eps=eps, weight_offset=offset)
        cos, sin = position_embeddings
        q, k = (x.transpose(1, 2) for x in _rotate(turn, layout, q, k, cos, sin, 2))
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        window = self.sliding_window
        out, probabilities = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, sliding_window=window, **kwargs
        )
        return self.o_proj(out.reshape(*heads[:-2], -1)), probabilities

    _compare_layers(module, forward, layout)
    return forward, "qk_norm_rotary"


def _compare_layers(module: Any, ours: Callable[..., Any], layout: _Layout) -> None:
    """Raise `Unsuited` unless `ours` and the layer's own forward call and return the same."""
    generator = torch.Generator().manual_seed(0)
    dim = module.head_dim
    hidden = torch.randn(2, 3, 8, generator=generator)
    projected = {n: torch.randn(2, 3, h * dim, generator=generator) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    stand_ins: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"o_proj": lambda x: 2 * x + 1}
    for name, value in projected.items():
        stand_ins[f"{name}_proj"] = partial(_given, value)
    weights = {f"{n}_norm.weight": torch.randn(dim, generator=generator) for n in ("q", "k")}
    angles = torch.randn(1, 3, dim // 2, generator=generator)
    tables, mask = (layout.spread(angles.cos()), layout.spread(angles.sin())), torch.zeros(3, 3)

    def observe(forward: Any) -> list[Any]:
        with _recorded(module, forward) as seen:
            for cache in (seen, None):
                arguments = {
                    "position_embeddings": tables,
                    "attention_mask": mask,
                    "past_key_values": cache,
                    "extra": 1,
                }
                out, _ = torch.func.functional_call(module, weights, (hidden,), arguments)
                seen.calls.append(out)
        return seen.calls

    with standing_in(module, stand_ins), use("reference"):
        for _ in both_modes(module):
            theirs, mine = result_of(lambda: (observe(type(module).forward), observe(ours)))
            if not _same(theirs, mine):
                raise Unsuited("calls its cache or its attention function differently")


def _given(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value


class _Recorder:
    """Stands in for cache and attention function, and keeps what both are given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def update(self, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((k, v, rest, sorted(options.items())))
        return k + 1, v - 1

    def attend(self, module: nn.Module, q: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, None]:
        self.calls.append((q, *rest, sorted(options.items())))
        return q.transpose(1, 2).contiguous(), None


@contextmanager
def _recorded(module: Any, forward: Callable[..., Any]) -> Iterator[_Recorder]:
    """`module` with `forward` and with a recorder for its attention function."""
    recorder, config = _Recorder(), module.config
    name = "tilewright_recorder"
    try:
        ALL_ATTENTION_FUNCTIONS[name] = recorder.attend
        module.__dict__["config"] = copy.copy(config)
        module.config._attn_implementation_internal = name
        module.__dict__["forward"] = MethodType(forward, module)
        yield recorder
    finally:
        module.__dict__.pop("forward", None)
        module.__dict__["config"] = config
        del ALL_ATTENTION_FUNCTIONS[name]


def _same(one: Any, other: Any) -> bool:
    """Equality of nested tuples and lists, up to rounding in tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
