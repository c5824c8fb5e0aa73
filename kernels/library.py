"""Ops: a launch, its shape function and its gradient, known to ``torch.library`` and called past it where nobody looks.

``torch.compile``, FakeTensor, selective activation checkpointing and the profiler's shape recording see each op as one
node, ``tilewright::NAME``. Getting there takes the dispatcher several turns through Python. A plain eager call, with
nothing around it that would want to see the op, therefore goes straight to its ``autograd.Function``, or to the launch
itself where no gradient is asked for; `Op.__call__` is the one place that decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("tilewright", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Op:
    """One registered op. Call it with the arguments of its schema, positionally."""

    def __init__(self, overload: torch._ops.OpOverload, launch: Callable[..., Any]) -> None:
        self.overload = overload
        self.name: str = overload._name
        self.launch = launch
        self.differentiable: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        # Asked here too, where asking costs no call.
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            refuse_transforms(self.name)
        wants_gradient = False
        for x in args:
            if isinstance(x, torch.Tensor):
                if type(x) not in _PLAIN:  # FakeTensor, DTensor and other subclasses
                    return self.overload(*args)
                if x.requires_grad:
                    wants_gradient = True
        if torch._C._len_torch_dispatch_stack():  # selective checkpointing, FLOP counters, tracers
            return self.overload(*args)
        if wants_gradient and self.differentiable is not None and torch.is_grad_enabled():
            return self.differentiable(*args)
        return self.launch(*args)


def refuse_transforms(name: str) -> None:
    """Raise inside a ``torch.func`` transform or forward-mode differentiation, which would pass a kernel by unseen.

    Raises:
        RuntimeError: one of the two is active.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name} has no torch.func transforms and no forward-mode derivative: use backward() or "
            "torch.autograd.grad(), or, of a Triton kernel, the same inside tilewright.kernels.use('reference')"
        )


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Op:
    """Register ``tilewright::NAME`` with its launch (CUDA, and CPU for the interpreter) and its shape function.

    Args:
        schema: ``"name(Tensor x, …) -> Tensor"``, without the namespace; the first tensor's device is where it runs.
        launch: allocates the outputs and launches the kernels.
        fake: the outputs' shapes, dtypes and strides, with no computation.
    """
    name = schema.split("(", 1)[0]
    launch = _on_the_tensors_device(launch)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CUDA")
    _LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"tilewright::{name}", fake, lib=_LIBRARY)
    return Op(getattr(torch.ops.tilewright, name).default, launch)


def _on_the_tensors_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` on the device of its first argument: Triton launches on the current device, whatever its tensors'."""

    def on_device(*args: Any) -> Any:
        first = args[0]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(first.device):
            return launch(*args)

    return on_device


def differentiate(op: Op, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """Give `op` its backward formula, to the dispatcher and to plain eager calls alike.

    Args:
        op: the op that `register` returned.
        backward: ``backward(ctx, *upstream)``, a gradient or None for each argument of the op.
        setup_context: ``setup_context(ctx, inputs, output)``, which saves what the backward pass needs.
    """
    torch.library.register_autograd(op.name, backward, setup_context=setup_context, lib=_LIBRARY)

    # One method, not forward and setup_context apart: for those, PyTorch binds the arguments by inspection, every call.
    def forward(ctx: Any, *args: Any) -> Any:
        output = op.launch(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    name = op.name.split("::")[1]
    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    # The base's `apply`: autograd.Function's own first asks for torch.func transforms, which `Op.__call__` has done.
    op.differentiable = super(torch.autograd.Function, function).apply  # type: ignore[misc]


def refuse_double_backward(op: Op) -> None:
    """Make the gradient of `op`, itself a backward pass, an error; without this it would silently be missing."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op.name} is a backward pass and has no gradient of its own; for second derivatives compute the "
            "same from plain PyTorch operations"
        )

    differentiate(op, backward)
