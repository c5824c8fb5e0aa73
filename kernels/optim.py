"""`AdamW`: the kernel of `tilewright.kernels.adamw` as a ``torch.optim.Optimizer``.

It takes the place of ``torch.optim.AdamW``: the same numbers, groups, learning-rate schedulers and GradScaler, and a
state dict that either of the two loads from the other. Beyond it:

- all tensors of a group are stepped in two launches (a few more where their dtypes or alignment differ);
- the state is float32 or bfloat16 whatever the parameters' dtype; bfloat16 parameters are rounded stochastically, or
  keep their low 16 bits in a companion and train as float32 parameters do;
- ``step(clip=…)`` scales the gradients as they are read, by a coefficient that never leaves the device.

Sharded parameters (DTensor, as ``fully_shard`` makes them) are stepped shard by shard, their state is sharded alike,
and their stochastic rounding does not depend on the number of shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from tilewright.kernels import adamw_cpu, dispatch
from tilewright.kernels.adamw import MultiTensor, Rule, Slot, aligned, check_rule, reference
from tilewright.kernels.apex import FusedAdamStep, check_fused_adam_serves, fused_adam_class
from tilewright.kernels.checks import FLOATS, is_number
from tilewright.kernels.dispatch import Choice, use
from tilewright.kernels.rows import accumulation_dtype
from tilewright.kernels.shards import first_element, is_laid_out, layout, local, whole

IMPLEMENTATIONS = ("auto", "triton", "reference", "apex")
ROUNDINGS = ("nearest", "stochastic", "low bits")
# How a process computes, not what: a state dict does not change them.
_OWN = ("state_dtype", "rounding", "implementation")


class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) over parameters in float32, float16 or bfloat16; float64 with the reference.

    Args:
        params: parameters, named parameters, or groups of them; each group may set any of the options below apart.
        lr: the learning rate: a number, or a tensor of one element, which may live on the device and change there.
        betas: β₁ and β₂, in [0, 1).
        eps: added to √v̂.
        weight_decay: decoupled: θ shrinks by lr · weight_decay each step.
        amsgrad: must be False; here for those who pass it on.
        maximize: step up the gradient instead of down.
        state_dtype: float32 or bfloat16, of ``exp_avg`` and ``exp_avg_sq`` (float64 for float64 parameters).
        rounding: of bfloat16 parameters: ``"nearest"``; ``"stochastic"``; or ``"low bits"``, which keeps what rounding
            would lose in the state (``low_bits``, int16) and so trains as float32 parameters do, to the bit. Others are
            rounded to nearest.
        seed: of stochastic rounding; the random bits depend on it, the parameter's place, the step and the element.
        implementation: ``"auto"`` (see `tilewright.kernels.choose`), ``"triton"``, ``"reference"``, or ``"apex"`` for
            NVIDIA's ``apex.optimizers.FusedAdam``, which is used on demand alone.

    The state of a parameter is ``step`` (float32, no dimension), ``exp_avg``, ``exp_avg_sq`` and, where kept,
    ``low_bits``; it is made at the first step that has a gradient for it, or by `initialise_state`.

    Raises:
        ValueError: an option is out of range, a parameter or gradient is complex or sparse, or the implementation that
            is demanded cannot serve; the message names which.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        rounding: str = "nearest",
        seed: int = 0,
        implementation: str = "auto",
    ) -> None:
        if amsgrad:
            raise ValueError("AdamW: amsgrad is True; it must be False: use torch.optim.AdamW for it")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "seed": seed,
            "implementation": implementation,
        }
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop what is worked out from the state and the parameters, and made again from them."""
        # Views and tables of pointers, each beside what it was made of; made again where that has changed.
        self._slots: dict[torch.Tensor, tuple[list[Any], Slot]] = {}
        self._steppers: dict[object, tuple[list[Any], Any]] = {}
        # GradScaler then leaves the unscaling and the skipping to `step`, which does both on the device.
        self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)  # a group saved by another optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what a group leaves out is as the constructor was given it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def initialise_state(self) -> None:
        """Make the state of every parameter now, as before its first step, for a checkpoint to be loaded into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, group)

    def choose(self, parameter: torch.Tensor) -> Choice:
        """The implementation that steps `parameter`, and why.

        Raises:
            ValueError: the parameter is not the optimizer's, or the implementation that is demanded cannot serve it.
        """
        for group in self.param_groups:
            if any(parameter is own for own in group["params"]):
                return _choose(group, parameter)
        raise ValueError("AdamW: the parameter is in none of the optimizer's groups")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, clip: torch.Tensor | float | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients.
            clip: the gradients are multiplied by it as they are read, such as the coefficient that `clip_coefficient`
                gives: a number or a tensor of one element. It costs no pass over the gradients and no wait.

        Returns:
            What `closure` returned.

        Raises:
            ValueError: a gradient is sparse, of another shape than its parameter or laid out over other devices, the
                state is on another device, or the implementation that is demanded cannot serve; the message names
                which.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        stepped: list[torch.Tensor] = []
        for position, group in enumerate(self.param_groups):
            by_choice: dict[tuple[str, torch.device], list[_Member]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    implementation = _choose(group, parameter).implementation
                    member = self._member(parameter, group, implementation, number)
                    by_choice.setdefault((implementation, member.slot.param.device), []).append(member)
                    stepped.append(parameter)
                number += 1
            for (implementation, device), members in by_choice.items():
                scaling = _Scaling.of(clip, getattr(self, "grad_scale", None), getattr(self, "found_inf", None), device)
                if implementation == "triton":
                    self._step_triton(position, group, members, scaling)
                elif implementation == "apex":
                    self._step_apex(position, group, members, scaling)
                else:
                    _step_reference(group, members, scaling)
                for member in members:
                    member.write_back()
        # Kernels write past autograd, which must know: a graph that saved a parameter before now has the wrong numbers.
        torch.autograd.graph.increment_version(stepped)
        return loss

    def _member(self, parameter: torch.Tensor, group: dict[str, Any], implementation: str, number: int) -> _Member:
        """`parameter`, its gradient and its state as this process's memory; views that still hold are used again."""
        state = self._state_of(parameter, group)
        mine, grad = local(parameter), _local_gradient(parameter)
        # apex takes the step from the host; the others read it where the parameter is, and may skip it there.
        device = torch.device("cpu") if implementation == "apex" else mine.device
        if state["step"].device != device:
            state["step"] = state["step"].to(device)
        kept = [local(state[key]) for key in ("exp_avg", "exp_avg_sq", "low_bits") if key in state]
        what = [number, mine.shape, mine.stride(), *(x.data_ptr() for x in (mine, *kept, state["step"]))]
        known, slot = self._slots.get(parameter, (None, None))
        if slot is not None and known == what:
            return _Member(slot, _in_order_of(mine, grad))
        for x in kept:
            if x.shape != mine.shape:
                raise ValueError(
                    f"AdamW: the state of a parameter has shape {tuple(x.shape)}; it must be {tuple(mine.shape)}, the "
                    "parameter's: the state dict that was loaded is another model's"
                )
            if x.device != mine.device:
                raise ValueError(
                    f"AdamW: the state of a parameter is on {x.device} and the parameter on {mine.device}; move one to "
                    "the other"
                )
        memory = mine if _is_dense(mine) else mine.contiguous()
        ordered = [_in_order_of(memory, x) for x in kept]
        exp_avg, exp_avg_sq, *low_bits = (_flat(x) for x in ordered)
        low = low_bits[0] if low_bits else None
        slot = Slot(_flat(memory), exp_avg, exp_avg_sq, low, state["step"], number, first_element(parameter))
        pairs = zip((mine, *kept), (memory, *ordered), strict=True)
        copies = [(original, copy) for original, copy in pairs if copy is not original]
        if not copies:
            self._slots[parameter] = what, slot
        return _Member(slot, _in_order_of(memory, grad), copies)

    def _state_of(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of `parameter`, made where there is none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            dtype = _state_dtype(parameter, group)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if not _keeps_low_bits(parameter, group):
            state.pop("low_bits", None)  # of a parameter that has been made float32, say
        elif "low_bits" not in state:
            state["low_bits"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state

    def _step_triton(self, position: int, group: dict[str, Any], members: list[_Member], scaling: _Scaling) -> None:
        device = members[0].slot.param.device
        grads = [member.grad for member in members]
        stepper = self._stepper((position, device, "triton"), members, lambda slots: MultiTensor(slots, grads))
        lr, (beta1, beta2) = group["lr"], group["betas"]
        rule = Rule(
            lr=lr.to(device, non_blocking=True) if isinstance(lr, torch.Tensor) else lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=-scaling.number if group["maximize"] else scaling.number,
            stochastic=group["rounding"] == "stochastic",
            seed=group["seed"],
        )
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            stepper(grads, rule, clip=scaling.clip, grad_scale=scaling.grad_scale, found_inf=scaling.found_inf)

    def _step_apex(self, position: int, group: dict[str, Any], members: list[_Member], scaling: _Scaling) -> None:
        if scaling.number != 1.0 or any(x is not None for x in scaling[:3]):
            raise ValueError(
                "AdamW: implementation is 'apex', whose FusedAdam neither clips nor unscales gradients; do so before "
                "the step, or use implementation='auto'"
            )
        device = members[0].slot.param.device
        stepper = self._stepper((position, device, "apex"), members, FusedAdamStep)
        stepper([_flat(member.grad) for member in members], group)

    def _stepper(self, place: object, members: list[_Member], make: Callable[[list[Slot]], Any]) -> Any:
        """What steps these members, made again where their memory, or what a launch must know of gradients, changed."""
        # The slots themselves: the stepper keeps them alive, so their identities are not given to others.
        what = [(id(slot), grad.dtype, aligned(grad)) for slot, grad, _ in members]
        known, stepper = self._steppers.get(place, (None, None))
        if stepper is None or known != what:
            stepper = make([member.slot for member in members])
            self._steppers[place] = what, stepper
        return stepper

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of ``torch.optim.AdamW`` gave.

        The numbers of each group are those saved; how the step is computed (`state_dtype`, `rounding`,
        `implementation`) stays as this optimizer was built.

        Raises:
            ValueError: the groups do not match, or AMSGrad was on.
        """
        own = [{name: group[name] for name in self.defaults} for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def note(_: Optimizer, final: dict[str, Any]) -> None:
            if any(group.get("amsgrad") for group in final["param_groups"]):
                raise ValueError("AdamW: the state dict is of an optimizer with amsgrad=True, which this one has not")
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            for group, options, saved in zip(self.param_groups, own, loaded["param_groups"], strict=True):
                # The seed too, which torch.optim.AdamW has not saved.
                group.update({name: x for name, x in options.items() if name in _OWN or name not in saved})
            self._take_state(loaded)

        # The base class casts all state to the parameter's dtype; what it was given, after the hooks of others, is
        # cast again here, before the hooks of others.
        hooks = (
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take_state(self, loaded: dict[str, Any]) -> None:
        """The state in `loaded`, each tensor in the dtype that this optimizer keeps it in."""
        saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        for group in self.param_groups:
            dtype = {"step": torch.float32, "low_bits": torch.int16}
            for parameter, key in zip(group["params"], saved, strict=False):
                found = loaded["state"].get(key)
                if not found:
                    continue
                dtype["exp_avg"] = dtype["exp_avg_sq"] = _state_dtype(parameter, group)
                names = [name for name in dtype if name in found]
                if not _keeps_low_bits(parameter, group) and "low_bits" in names:
                    names.remove("low_bits")
                state = {name: torch.as_tensor(found[name]) for name in names}
                state = {name: x.to(device=parameter.device, dtype=dtype[name]) for name, x in state.items()}
                if not is_laid_out(parameter) and _is_dense(parameter):
                    # Once here rather than at every step.
                    state = {
                        name: _in_order_of(parameter, x) if x.shape == parameter.shape else x
                        for name, x in state.items()
                    }
                self.state[parameter] = state


def clip_coefficient(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``step(clip=…)`` takes to scale the gradients down to a total norm of `max_norm`, without a wait for it.

    Args:
        parameters: those whose gradients count, of all groups, or one alone; sharded ones count as a whole.
        max_norm: the largest total 2-norm that is left as it is, at least 0; infinite to leave any.

    Returns:
        The coefficient, at most 1, and the norm: float32 tensors of no dimension (float64 where a gradient is). It is
        NaN where the norm is.

    Raises:
        ValueError: max_norm is no number of at least 0.
    """
    if not (max_norm == math.inf or (is_number(max_norm) and max_norm >= 0)):
        raise ValueError(f"clip_coefficient: max_norm is {max_norm!r}; it must be a number, at least 0")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in (p.grad for p in parameters):
        if grad is not None:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
    # Not torch.nn.utils.get_total_norm, whose norms of float16 gradients are float16: past 65504 infinite.
    norms = [
        norm
        for (_, dtype), grads in alike.items()
        for norm in torch._foreach_norm(grads, 2, dtype=accumulation_dtype(dtype))
    ]
    if not norms:
        return torch.ones(()), torch.zeros(())
    norm = whole(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
    return (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


class _Scaling(NamedTuple):
    """What the gradients are multiplied by (`clip`, `number`) and divided by, and whether the step is skipped."""

    clip: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    number: float = 1.0

    @classmethod
    def of(
        cls,
        clip: torch.Tensor | float | None,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        device: torch.device,
    ) -> _Scaling:
        """On `device`, without a wait."""

        def there(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
            if x is not None and x.numel() != 1:
                raise ValueError(f"AdamW: {name} has shape {tuple(x.shape)}; it must be one number")
            return whole(x).reshape(()).to(device, non_blocking=True) if x is not None else None

        if not (clip is None or isinstance(clip, torch.Tensor) or is_number(clip)):
            raise ValueError(f"AdamW: clip is {clip!r}; it must be a finite number, a tensor of one element, or None")
        number = 1.0 if clip is None or isinstance(clip, torch.Tensor) else float(clip)
        tensor = clip if isinstance(clip, torch.Tensor) else None
        return cls(there("clip", tensor), there("grad_scale", grad_scale), there("found_inf", found_inf), number)

    def factor(self) -> torch.Tensor | float:
        """All that the gradients are multiplied by."""
        factor: torch.Tensor | float = self.number if self.clip is None else self.clip * self.number
        return factor if self.grad_scale is None else factor / self.grad_scale


class _Member(NamedTuple):
    """A parameter of the step: its memory as a `Slot`, and its gradient in the same order of memory."""

    slot: Slot
    grad: torch.Tensor
    # What the slot holds copies of, and the copies: a parameter with gaps in its memory, state in another order.
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

    def write_back(self) -> None:
        """Bring the results to where the slot holds copies."""
        for original, copy in self.copies:
            original.copy_(copy)


# Elements of a chunk, few enough for the processor's cache.
_CHUNK = 1 << 18


def _step_reference(group: dict[str, Any], members: list[_Member], scaling: _Scaling) -> None:
    """In place: where all is float32 (or float64), through PyTorch's own fused kernel; else through `adamw_cpu` where
    it serves and nothing else is demanded; else in plain PyTorch."""
    if scaling.found_inf is not None and bool(scaling.found_inf):
        return
    torch._foreach_add_([member.slot.step for member in members], 1)
    factor = scaling.factor()
    fused: list[list[torch.Tensor]] = []
    mixed: list[tuple[Slot, torch.Tensor]] = []
    for slot, grad, _ in members:
        quartet = [slot.param, _flat(grad), slot.exp_avg, slot.exp_avg_sq]
        if len({x.dtype for x in quartet}) == 1 and slot.param.dtype in (torch.float32, torch.float64):
            fused.append([*quartet, slot.step])
            continue
        if group["implementation"] == "auto" and adamw_cpu.serves(slot, quartet[1]):
            mixed.append((slot, quartet[1]))
            continue
        parts = [x.split(_CHUNK) for x in slot.tensors() if x is not None]
        for start, part_grad, *old in zip(count(0, _CHUNK), quartet[1].split(_CHUNK), *parts, strict=False):
            param, exp_avg, exp_avg_sq, *low_bits = old
            new = reference(
                param, part_grad, exp_avg, exp_avg_sq, step=int(slot.step), lr=float(group["lr"]), betas=group["betas"],
                eps=group["eps"], weight_decay=group["weight_decay"], maximize=group["maximize"], clip=factor,
                low_bits=low_bits[0] if low_bits else None, stochastic=group["rounding"] == "stochastic",
                seed=group["seed"], number=slot.number, first=slot.first + start,
            )  # fmt: skip
            for x, result in zip(old, new, strict=True):
                x.copy_(result)
    if mixed:
        beta1, beta2 = group["betas"]
        scale = -float(factor) if group["maximize"] else float(factor)
        rule = Rule(
            float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], scale,
            group["rounding"] == "stochastic", group["seed"],
        )  # fmt: skip
        adamw_cpu.step(mixed, rule)
    if isinstance(factor, float) and factor == 1.0:
        if fused:
            _step_fused(group, *zip(*fused, strict=True))
        return
    for *quartet, step in fused:
        # A chunk at a time: the scaled gradient, which is not to be left in the parameter's own, stays in the cache.
        for param, grad, exp_avg, exp_avg_sq in zip(*(x.split(_CHUNK) for x in quartet), strict=True):
            _step_fused(group, [param], [grad * factor], [exp_avg], [exp_avg_sq], [step])


def _step_fused(group: dict[str, Any], *lists: Iterable[torch.Tensor]) -> None:
    """PyTorch's fused AdamW on lists of parameters, gradients, exp_avg, exp_avg_sq and steps, which stand already."""
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(tensors) for tensors in lists)
    lr, (beta1, beta2) = group["lr"], group["betas"]
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, beta1=beta1, beta2=beta2, eps=group["eps"],
        lr=lr.to(params[0].device) if isinstance(lr, torch.Tensor) else lr, weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )  # fmt: skip


def _check_group(group: dict[str, Any]) -> None:
    """Every option of a group is one that is allowed, and every parameter one that can be stepped."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr has shape {tuple(lr.shape)}; it must be one number")
    check_rule(
        "AdamW",
        float(lr) if isinstance(lr, torch.Tensor) else lr,
        group["betas"],
        group["eps"],
        group["weight_decay"],
        group["seed"],
    )
    if group["state_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"AdamW: state_dtype is {group['state_dtype']}; it must be torch.float32 or torch.bfloat16")
    for name, allowed in (("rounding", ROUNDINGS), ("implementation", IMPLEMENTATIONS)):
        if group[name] not in allowed:
            raise ValueError(f"AdamW: {name} is {group[name]!r}; it must be one of {', '.join(allowed)}")
    for number, parameter in enumerate(group["params"]):
        if parameter.dtype not in FLOATS:
            raise ValueError(
                f"AdamW: parameter {_name(group, number)} has dtype {parameter.dtype}; it must be float32, float16, "
                "bfloat16 or float64"
            )
        if parameter.dtype == torch.float16 and group["rounding"] != "nearest":
            raise ValueError(
                f"AdamW: rounding is {group['rounding']!r} and parameter {_name(group, number)} float16; that "
                "rounding is of bfloat16 parameters: convert it, or give it a group with rounding='nearest'"
            )
    if group["implementation"] == "apex":
        fused_adam_class()


def _name(group: dict[str, Any], number: int) -> str:
    """The name of a group's parameter where it has one, else its number."""
    return str(group["param_names"][number]) if "param_names" in group else f"number {number} of its group"


def _choose(group: dict[str, Any], parameter: torch.Tensor) -> Choice:
    """The implementation for a parameter of the group, with the reason."""
    implementation = group["implementation"]
    if implementation == "auto":
        return dispatch.choose(parameter.device, parameter.dtype)
    if implementation == "triton":
        with use("triton"):  # which says what stands in the way
            dispatch.choose(parameter.device, parameter.dtype)
    if implementation == "apex":
        check_fused_adam_serves(parameter, group)
    return Choice(implementation, f"demanded by implementation={implementation!r}")


def _state_dtype(parameter: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
    wide: torch.dtype = group["state_dtype"]
    return torch.float64 if parameter.dtype == torch.float64 else wide


def _keeps_low_bits(parameter: torch.Tensor, group: dict[str, Any]) -> bool:
    return group["rounding"] == "low bits" and parameter.dtype == torch.bfloat16


def _local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of `parameter` on this process, laid over the processes as the parameter is."""
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"AdamW: the gradient of a parameter of shape {tuple(parameter.shape)} is sparse ({grad.layout}); it must "
            "be dense: use torch.optim.SparseAdam for it, or grad.to_dense()"
        )
    # A gradient from before `parameter.data` was replaced: PyTorch keeps it, and a kernel would read past its end.
    if grad.shape != parameter.shape or grad.device != parameter.device:
        raise ValueError(
            f"AdamW: the gradient of a parameter of shape {tuple(parameter.shape)} on {parameter.device} has shape "
            f"{tuple(grad.shape)} and is on {grad.device}; it must be as the parameter"
        )
    if grad.dtype not in FLOATS or (grad.dtype == torch.float64 and parameter.dtype != torch.float64):
        raise ValueError(
            f"AdamW: the gradient of a parameter of shape {tuple(parameter.shape)} has dtype {grad.dtype} and the "
            f"parameter {parameter.dtype}; it must be float32, float16 or bfloat16, or that of the parameter"
        )
    if layout(grad) != layout(parameter):
        raise ValueError(
            f"AdamW: the gradient of a parameter of shape {tuple(parameter.shape)} is laid over the processes as "
            f"{layout(grad)}; it must be as the parameter: {layout(parameter)}"
        )
    return local(grad)


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements of `x` fill one run of memory, each place once, in whatever order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _in_order_of(memory: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` with the order in memory of a dense tensor of its shape: itself, or a copy."""
    if x.stride() == memory.stride() or (x.is_contiguous() and memory.is_contiguous()):
        return x
    return torch.empty_like(memory, dtype=x.dtype).copy_(x)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor, in its order."""
    # Detached: a view would hold the parameter itself, which ``torch.utils.swap_tensors`` then refuses.
    return x.detach().as_strided((x.numel(),), (1,))
