"""The loss of a causal language model straight from its hidden states, so that training never holds all the logits.

Where a model is in training and is given labels, its own forward is passed by: the body runs, and the head computes
`linear_cross_entropy` where it stands, as a call of the head itself, so that hooks which bring its weight there (FSDP,
offloading) run as ever. The output then has a loss and no logits. Everything else, evaluation and generation
included, takes the model's own forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from tilewright.kernels.huggingface.instances import is_bound
from tilewright.kernels.huggingface.probing import Unsuited
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy

# What families do to the logits, by the name in their configuration: a factor, which may as well scale the hidden
# states. A softcap is an option of the loss.
_FACTORS: dict[str, Callable[[float], float]] = {"logits_scaling": lambda x: 1.0 / x, "logit_scale": lambda x: x}
_SOFTCAP = "final_logit_softcapping"
_HANDLED_HERE = {"labels", "logits_to_keep", "return_dict"}
_ROUTER = "output_router_logits"  # asks mixtures of experts for a second loss
_PASSED_ON = ("past_key_values", "hidden_states", "attentions", "cross_attentions")


def model_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """A forward for `model`, which calls the body and then the head's forward with targets.

    Raises:
        Unsuited: the model's loss is not known to be the cross-entropy of its head on the body's last hidden states.
    """
    theirs: Any = type(model).forward
    head, body = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear:
        raise Unsuited(f"has a head of type {type(head).__name__}, not a plain linear layer")
    if not _is_readable(head.weight):
        raise Unsuited(f"has a head whose weight is of type {type(head.weight).__name__}")
    if model.config.is_encoder_decoder:
        raise Unsuited("has an encoder and a decoder, and so another loss than that of a causal language model")
    if body is model or head.weight.is_meta:
        raise Unsuited("has no body apart from its head" if body is model else "has weights on the meta device")
    names = [name for name, p in inspect.signature(theirs).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    unknown = set(names) - _HANDLED_HERE - {_ROUTER} - set(inspect.signature(type(body).forward).parameters)
    if "labels" not in names or unknown:
        raise Unsuited(f"takes {', '.join(sorted(unknown))} beyond its body" if unknown else "takes no labels")
    if model.loss_function is not ForCausalLMLoss:
        raise Unsuited("has another loss than the shifted cross-entropy of a causal language model")
    _compare(model, head, body)

    @functools.wraps(theirs)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if not _is_fused(self, given):
            return theirs(self, *args, **kwargs)
        outputs = self.base_model(**{name: x for name, x in given.items() if name not in _HANDLED_HERE})
        loss = _loss(self.get_output_embeddings(), self.config.get_text_config(), outputs.last_hidden_state, given)
        return CausalLMOutputWithCrossAttentions(loss=loss, **{name: outputs.get(name) for name in _PASSED_ON})

    # Who undoes wrappers until the innermost function, as accelerate does, is to end here.
    forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def head_forward(head: nn.Module) -> Callable[..., torch.Tensor]:
    """A forward for a linear head that, called with targets, returns their loss instead of the logits."""
    theirs: Any = type(head).forward

    def forward(
        self: nn.Linear, input: torch.Tensor, targets: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        if targets is None:
            logits: torch.Tensor = theirs(self, input)
            return logits
        loss = linear_cross_entropy(input, self.weight, targets, bias=self.bias, **options)
        assert isinstance(loss, torch.Tensor)
        return loss

    return forward


def _is_fused(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether this call trains, in the way that was compared, on a head that nobody has wrapped or exchanged since."""
    keep, returns_dict = given.get("logits_to_keep", 0), given.get("return_dict")
    head: Any = model.get_output_embeddings()
    return bool(
        model.training
        and given.get("labels") is not None
        and isinstance(keep, int)
        and keep == 0
        and (model.config.return_dict if returns_dict is None else returns_dict)
        and not (getattr(model.config, _ROUTER, False) if given.get(_ROUTER) is None else given[_ROUTER])
        and model.loss_function is ForCausalLMLoss
        and is_bound(head)
        and _is_readable(head.weight)
    )


def _is_readable(weight: torch.Tensor) -> bool:
    """Whether the kernel finds the numbers themselves in `weight`, or an FSDP shard of them; not so in a tensor that
    torchao has quantised."""
    return isinstance(weight, DTensor) or not is_traceable_wrapper_subclass(weight)


def _loss(head: Callable[..., torch.Tensor], config: Any, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """The loss as `transformers` defines it: the token after each position is its target, and the sum is divided by
    `num_items_in_batch` where the trainer counts over several batches."""
    for name, factor in _FACTORS.items():
        if getattr(config, name, None) is not None:
            hidden = hidden * factor(getattr(config, name))
    ignore_index, targets = given.get("ignore_index", -100), given.get("shift_labels")
    if targets is None:
        targets = nn.functional.pad(given["labels"], (0, 1), value=ignore_index)[..., 1:]
    count = given.get("num_items_in_batch")
    loss = head(
        hidden,
        targets=targets.to(hidden.device),
        ignore_index=ignore_index,
        softcap=getattr(config, _SOFTCAP, None),
        reduction="mean" if count is None else "sum",
    )
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)


def _compare(model: PreTrainedModel, head: nn.Linear, body: nn.Module) -> None:
    """Run the model's own forward and ours on random hidden states in place of the body's.

    Raises:
        Unsuited: the losses differ, or the model cannot be run so.
    """
    device, classes = head.weight.device, head.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, head.weight.shape[1], generator=generator).to(device, head.weight.dtype)
    tokens = torch.randint(classes, (2, 5), generator=generator).to(device)
    labels, padding = tokens.clone(), torch.ones_like(tokens)
    labels[0, 1], padding[1, 3:] = -100, 0
    ours_on = functools.partial(head_forward(head), head)
    before = body.__dict__.get("forward")
    stand_in = BaseModelOutputWithPastAndCrossAttentions()
    stand_in.router_logits = None  # mixtures of experts read it
    calls = []

    def body_forward(*args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        calls.append(args)
        return stand_in

    try:
        with torch.no_grad():
            # Logits well away from 0, where a softcap or a factor shows.
            hidden = hidden * (20.0 / head(hidden).float().std().clamp(min=1e-3)).to(hidden.dtype)
            stand_in["last_hidden_state"] = hidden
            body.__dict__["forward"] = body_forward
            for options in ({}, {"num_items_in_batch": 5}):
                given = {"labels": labels, **options}
                theirs = model(input_ids=tokens, attention_mask=padding, return_dict=True, **given).loss
                if not calls:
                    raise Unsuited("reaches into its body instead of calling it")
                ours = _loss(ours_on, model.config.get_text_config(), hidden, given)
                tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
                if not torch.allclose(theirs.float(), ours.float(), rtol=tolerance):
                    raise Unsuited(
                        f"has a loss of {float(theirs):.6g} where linear_cross_entropy gives {float(ours):.6g}"
                    )
    except Unsuited:
        raise
    except Exception as error:
        if isinstance(error, AttributeError) and error.obj is stand_in:
            raise Unsuited(f"reads {error.name} of its body beside the last hidden states") from error
        raise Unsuited(f"cannot be tried on a small input: {type(error).__name__}: {error}") from error
    finally:
        body.__dict__.pop("forward", None)
        if before is not None:
            body.__dict__["forward"] = before
