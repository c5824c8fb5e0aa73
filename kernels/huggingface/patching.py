"""`patch` and `unpatch`: a built model of `transformers` on our kernels, and back; and the report of what was done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from tilewright.kernels.huggingface.attention_registry import NAME, register_attention
from tilewright.kernels.huggingface.head import head_forward, model_forward
from tilewright.kernels.huggingface.instances import bind, is_bound, is_wrapped, unbind
from tilewright.kernels.huggingface.norms_and_mlps import is_mlp, is_norm, mlp_forward, norm_forward
from tilewright.kernels.huggingface.probing import Unsuited
from tilewright.kernels.huggingface.rotation import has_qk_norm, has_rotary, qk_norm_rotary_forward, rotary_forward

_RECORD = "_tilewright_patch"
_Forward = tuple[Callable[..., Any], str]


class Replaced(NamedTuple):
    """One replacement: the module's name in the model, its class or part, and the kernel that now serves it."""

    module: str
    what: str
    by: str


class Left(NamedTuple):
    """One module left alone: its name, its class or part, and why."""

    module: str
    what: str
    why: str


@dataclass
class PatchReport:
    """What `patch` replaced and what it left alone; printed, a line for each kind of module."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = _lines("replaced", self.replaced, " → ") + _lines("left alone", self.left, ": ")
        return "\n".join(lines)


def _lines(title: str, rows: list[Any], arrow: str) -> list[str]:
    """Rows that say the same of several modules, as one line with their count and the first one's name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module, what, why in rows:
        groups.setdefault((what, why), []).append(module or "the model")
    lines = [f"{title}:"] if groups else [f"{title}: nothing"]
    for (what, why), modules in groups.items():
        more = f", … ({len(modules)})" if len(modules) > 1 else ""
        lines.append(f"  {what}{arrow}{why}   [{modules[0]}{more}]")
    return lines


@dataclass
class _Record:
    """What `unpatch` needs: the report, the patched modules, and each configuration's former attention."""

    report: PatchReport
    modules: list[nn.Module]
    implementations: list[tuple[Any, str | None]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register_attention()  # a pickled model may be loaded where nobody has registered it yet


def patch(
    model: PreTrainedModel,
    *,
    attention: bool = True,
    rotary: bool = True,
    norms: bool = True,
    mlps: bool = True,
    fused_head: bool = True,
) -> PatchReport:
    """Let a built model of `transformers` run on our kernels. Only this instance changes, and `unpatch` undoes it.

    Parameters, state-dict keys, ``save_pretrained``, ``generate``, hooks and the ``Trainer`` work as before. Logits and
    gradients agree with the unpatched model to the rounding of the dtype. Patch before wrapping the model in PEFT, FSDP
    or ``torch.compile``, so that they see what runs. Of a patched model that is pickled, the copy that is loaded runs
    its own forwards: `unpatch` it, and `patch` it again.

    Args:
        model: a ``PreTrainedModel`` on any device, its weights loaded.
        attention: switch to ``attn_implementation="tilewright"`` (see `register_attention`).
        rotary: rotate queries and keys in one launch.
        norms: RMSNorm and LayerNorm.
        mlps: SwiGLU and GeGLU between the matrix products of gated MLPs.
        fused_head: in training with labels, the loss from hidden states without logits; the output's ``logits`` is then
            None. Turn it off if something reads the logits of a training step.

    Returns:
        What was replaced and by what, and what was left alone and why; ``print`` it.

    Raises:
        ValueError: `model` is no ``PreTrainedModel``, or is patched already.
    """
    _check("patch", model)
    if _RECORD in model.__dict__:
        raise ValueError("patch: the model is patched already; unpatch(model) first to change what is replaced")
    record = _Record(PatchReport(), [], [])
    rotations: dict[type[nn.Module], _Forward] = {}
    normed: set[str] = set()  # norms that their layer computes together with its rotation
    for name, module in model.named_modules():
        kind = type(module).__name__
        if norms and is_norm(module) and name not in normed:
            _replace(record, name, module, kind, norm_forward)
        elif mlps and is_mlp(module):
            _replace(record, name, module, kind, mlp_forward)
        elif rotary and has_rotary(module):
            by = _replace(record, name, module, f"rotary embedding in {kind}", partial(_rotation, rotations, norms))
            if by == "qk_norm_rotary":
                normed |= {f"{name}.q_norm", f"{name}.k_norm"}
    if attention:
        _switch_attention(record, model)
    if fused_head:
        _fuse_head(record, model)
    model.__dict__[_RECORD] = record
    return record.report


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`: the model computes what it did before, to the bit.

    Raises:
        ValueError: `model` is no ``PreTrainedModel``, is not patched, or a patched module's forward was wrapped since.
    """
    _check("unpatch", model)
    record: _Record | None = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError("unpatch: the model is not patched")
    # A module that was exchanged since, as a head is when the vocabulary grows, is no hindrance: what it was is undone.
    wrapped = [module for module in record.modules if is_wrapped(module)]
    if wrapped:
        first = next((name for name, module in model.named_modules() if module is wrapped[0]), "a module taken out")
        raise ValueError(
            f"unpatch: of {len(record.modules)} patched modules {len(record.modules) - len(wrapped)} still run what "
            f"patch gave them; undo what wrapped the others ({first or 'the model itself'} first) since, for example "
            "with accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    for module in record.modules:
        unbind(module)
    for config, implementation in record.implementations:
        config._attn_implementation_internal = implementation
    del model.__dict__[_RECORD]


def _check(op: str, model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{op}: model is a {type(model).__name__}; it must be a transformers.PreTrainedModel (of a wrapped model, "
            "give the one inside)"
        )


def _replace(
    record: _Record, name: str, module: nn.Module, what: str, recognise: Callable[[nn.Module], _Forward]
) -> str | None:
    """Give `module` the forward that `recognise` finds for it, and return the call it makes; or put down why not."""
    try:
        if "forward" in module.__dict__:
            raise Unsuited("has a forward of its own, from a hook or another patch")
        forward, by = recognise(module)
    except Unsuited as reason:
        record.report.left.append(Left(name, what, str(reason)))
        return None
    bind(module, forward)
    record.modules.append(module)
    record.report.replaced.append(Replaced(name, what, by))
    return by


def _rotation(forwards: dict[type[nn.Module], _Forward], norms: bool, module: nn.Module) -> _Forward:
    """With the norms of q and k in it where it can be; else alone, one forward a class, as classes have it."""
    if norms and has_qk_norm(module):
        try:
            return qk_norm_rotary_forward(module)
        except Unsuited:
            pass  # then the norms and the rotation are replaced one by one
    if type(module) not in forwards:
        forwards[type(module)] = rotary_forward(module)
    return forwards[type(module)]


def _switch_attention(record: _Record, model: PreTrainedModel) -> None:
    """Set the model's attention implementation, and those of the models inside it."""
    calling = {name: module for name, module in model.named_modules() if _asks_the_registry(module)}
    above = {name for called in calling for name in _parents(called)}
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower() and name not in calling and name not in above:
            why = "does not ask transformers' registry for its attention"
            record.report.left.append(Left(name, type(module).__name__, why))
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    configs |= {id(m.config): m.config for m in calling.values()}
    reason = None
    if any(getattr(config, "output_attentions", False) for config in configs.values()):
        reason = "the configuration asks for output_attentions, which a kernel has not"
    elif not model._can_set_attn_implementation():
        reason = "transformers does not let the attention of this class be set"
    else:
        before = [(config, config._attn_implementation) for config in configs.values()]
        register_attention()
        model.set_attn_implementation(NAME)
        record.implementations.extend(before)
    for name, module in calling.items():
        if reason is None and module.config._attn_implementation == NAME:
            record.report.replaced.append(Replaced(name, type(module).__name__, f'attention, as "{NAME}"'))
        else:
            why = reason or "transformers keeps another implementation for it"
            record.report.left.append(Left(name, type(module).__name__, why))


def _asks_the_registry(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    named = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    return "ALL_ATTENTION_FUNCTIONS" in named and hasattr(module, "config")


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _fuse_head(record: _Record, model: PreTrainedModel) -> None:
    """The model's forward and its head's, together or not at all."""
    head = model.get_output_embeddings()
    if head is None:
        return  # a body alone, or a classifier: no vocabulary, nothing to gain
    what = f"loss of {type(model).__name__}"
    _replace(record, "", model, what, lambda m: (model_forward(model), "linear_cross_entropy, in training"))
    if is_bound(model):
        bind(head, head_forward(head))
        record.modules.append(head)
