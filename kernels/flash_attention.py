"""Whether flash-attn serves a call of attention, and the call.

Three generations of flash-attn (github.com/Dao-AILab/flash-attention) are looked for, none is required:

    2   `flash_attn`             Ampere to Hopper, every option but sinks
    3   `flash_attn_interface`   Hopper, every option but sinks
    4   `flash_attn.cute`        Hopper and Blackwell; no sinks, softcap in inference only

A generation is chosen only where it keeps what Tilewright's own kernels promise:

- gradients are the same in every run: `deterministic=True` is passed. Generation 3 ignored it until September 2025
  (issue #1596); the builds since are told by the ops that they register. It has no such mode past head_dim 192, and
  generation 4 has none on Hopper;
- no gradient goes missing: none of the three gives one for sinks, or for the log-sum-exp, so neither is left to them;
- a query that may see no key gives zeros, and no call fails for its strides, its size or for being empty.

Calls go through flash-attn's public functions, thus its own autograd. A second derivative raises, as everywhere here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import CustomOpDef  # type: ignore[attr-defined]

from tilewright.kernels import dispatch
from tilewright.kernels.autocast import to_lower_precision
from tilewright.kernels.dispatch import Choice
from tilewright.kernels.launch import generation as chip_of

_MODULES = {
    "flash-attn 2": "flash_attn.flash_attn_interface",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
# On each chip, which serve it, the fastest first.
_ON_CHIP = {8: ("flash-attn 2",), 9: ("flash-attn 3", "flash-attn 4", "flash-attn 2"), 10: ("flash-attn 4",)}
_PARAMETERS = {"q", "k", "v", "softmax_scale", "causal", "window_size", "softcap", "deterministic"}


@dataclass(frozen=True)
class _Installed:
    """A generation that can be imported and has the functions that are called here."""

    dense: Callable[..., Any]
    packed: Callable[..., Any]
    registers_ops: bool  # with torch.library, so that torch.compile sees through it


# By name: the generation, or in words why it is out of the question. Filled at the first question, not at import.
_found: dict[str, _Installed | str] = {}


def choose_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> Choice:
    """What would serve `attention` with these arguments, and why.

    Args:
        q, k, v and the rest: as for `attention`.

    Returns:
        "triton", "reference", "flash-attn 2", "flash-attn 3" or "flash-attn 4", and the reason; where a flash-attn is
        installed but not chosen, the reason says what it lacks.
    """
    q, k, v = to_lower_precision(q, k, v)
    return choose(q, k, v, causal, window, softcap, sinks, cu_seqlens, return_lse)


def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_lse: bool,
) -> Choice:
    """`choose_attention`, once autocast has been seen to."""
    choice = dispatch.choose(q.device, q.dtype)
    if choice.implementation != "triton" or dispatch.demanded():
        return choice
    refusals = []
    for name in _candidates(q.device):
        lack = _lack(name, q, k, v, causal, window, softcap, sinks, cu_seqlens, return_lse)
        if lack is None:
            return Choice(name, "installed, and covers the case")
        refusals.append(f"{name} {lack}")
    return Choice("triton", "; ".join([choice.reason, *refusals]))


def call(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
) -> torch.Tensor:
    """Attention by the named generation; layouts are the same as `attention`'s."""
    installed = _probe(name)
    assert isinstance(installed, _Installed), "chosen, so it is there"
    # Theirs is how far a query looks to each side, both ends included; ours counts the query's own key.
    unbounded = None if name == "flash-attn 4" else -1
    left = unbounded if window is None else window - 1
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (left, 0 if causal and window is not None else left),
        "softcap": softcap or 0.0,
        "deterministic": True,
    }
    if not torch.compiler.is_compiling() and _trains(q, k, v):
        q, k, v = _OnceDifferentiable.apply(q, k, v)
    if cu_seqlens is None:
        result = installed.dense(q, k, v, **options)
    else:
        documents = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        result = installed.packed(q, k, v, **documents, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options)
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result  # some builds always add the log-sum-exp
    return out


def _lack(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_lse: bool,
) -> str | None:
    """What keeps a generation from this case, in words that follow its name; None if nothing does."""
    installed = _probe(name)
    if isinstance(installed, str):
        return installed
    head_dim, trains = q.shape[-1], _trains(q, k, v)
    rules = (
        (q.dtype in (torch.float16, torch.bfloat16), f"takes float16 and bfloat16, not {q.dtype}"),
        (sinks is None, "gives no gradient for sinks"),
        (not return_lse, "gives no gradient for the log-sum-exp"),
        (head_dim % 8 == 0, f"takes multiples of 8 as head_dim, not {head_dim}"),
        (name != "flash-attn 4" or head_dim in (64, 96, 128), f"takes head_dim 64, 96 and 128, not {head_dim}"),
        (name != "flash-attn 4" or softcap is None or not trains, "has no gradient with a softcap"),
        (name != "flash-attn 4" or _chip(q.device) >= 100 or not trains, "has no deterministic gradient on Hopper"),
        (name != "flash-attn 3" or head_dim <= 192 or not trains, "has no deterministic gradient past head_dim 192"),
        (
            name != "flash-attn 3" or installed.registers_ops or not trains,
            "has no deterministic gradient in this build, from before September 2025",
        ),
        (
            causal or window is None or cu_seqlens is not None or q.shape[1] <= k.shape[1],
            "misplaces a window that is not causal where there are more queries than keys",
        ),
        (installed.registers_ops or not torch.compiler.is_compiling(), "cannot be traced by torch.compile"),
        (all(_plain(x, cu_seqlens) for x in (q, k, v)), "does not take these strides or sizes"),
    )
    return next((lack for holds, lack in rules if not holds), None)


def _trains(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _plain(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    """Neither empty nor past 32-bit indices, in rows that start on 16 bytes, few enough for a grid's narrow axes."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0]
    aligned = x.stride(-1) == 1 and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
    if aligned and not torch.compiler.is_compiling():  # which knows no offsets, and lays its own tensors out aligned
        aligned = x.storage_offset() % 8 == 0
    return aligned and 0 < x.numel() < 2**31 and sequences < 65536 and x.shape[-2] < 65536


@torch.compiler.assume_constant_result
def _chip(device: torch.device) -> int:
    return chip_of(device)


@torch.compiler.assume_constant_result
def _candidates(device: torch.device) -> tuple[str, ...]:
    """The generations that serve the chip and have been found in any state."""
    if torch.version.hip is not None:
        return ()
    return tuple(name for name in _ON_CHIP.get(chip_of(device) // 10, ()) if _probe(name) != "is not installed")


def _probe(name: str) -> _Installed | str:
    if name not in _found:
        _found[name] = _look_for(name)
    return _found[name]


def _look_for(name: str) -> _Installed | str:
    """Import a generation, whatever may be wrong with it: a broken or an unrelated package only goes unused."""
    try:
        module = importlib.import_module(_MODULES[name])
        dense, packed = module.flash_attn_func, module.flash_attn_varlen_func
        for function in (dense, packed):
            missing = _PARAMETERS - inspect.signature(function).parameters.keys()
            if missing:
                return f"has no argument {', '.join(sorted(missing))} in this version"
    except ModuleNotFoundError as error:
        absent = _MODULES[name].startswith(f"{error.name}") if error.name else False
        return "is not installed" if absent else f"cannot be imported ({error})"
    except Exception as error:  # a build for another torch raises whatever its loader raises
        return f"cannot be used ({type(error).__name__}: {error})"
    registered = isinstance(getattr(module, "_flash_attn_forward", None), CustomOpDef)
    return _Installed(dense, packed, registered)


class _OnceDifferentiable(torch.autograd.Function):
    """q, k and v unchanged; a gradient of their gradients is refused, as flash-attn's builds may leave it out."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        ctx.save_for_backward(q, k, v)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return gradients
        return _Refusal.apply(*gradients, *ctx.saved_tensors)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, *inputs: torch.Tensor) -> Any:
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "attention: flash-attn has no second derivatives; for those compute the same from plain PyTorch operations"
        )
