"""A stand-in for the GPU that another library asks about, so that its own host code chooses launches as on that GPU.

A library chooses block sizes, warps and grids by the device of its tensors, by what ``torch.cuda`` and Triton's driver
say of it, and by timing candidates. Inside `standing_in_for` CPU tensors call themselves CUDA tensors, the questions
are answered as the GPU would, and `triton.autotune` chooses without a clock. Import the library inside the block: some
ask once, at import.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from tilewright.kernels.ahead_of_time import SHARED_MEMORY
from tilewright.kernels.dispatch import INTERPRETED

_CUDA = torch.device("cuda", 0)
_NAMES = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200"}

# Tries the configurations of one autotuned launch, `try_one(i)` carrying out the i-th of `count`, and keeps one.
Tuner = Callable[[Callable[[int], Any], int], Any]


@contextmanager
def standing_in_for(chip: int, processors: int, tune: Tuner) -> Iterator[None]:
    """Answer as a GPU of generation `chip` with that many streaming multiprocessors would.

    Args:
        chip: compute capability × 10.
        processors: streaming multiprocessors.
        tune: what stands in for `triton.autotune`'s timing.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    previous = driver._active
    with ExitStack() as stack:
        for name, answer in _answers(chip, processors).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(Autotuner, "run", _autotuned_by(tune)))
        # Tuning results must not reach the cache of the user, whose runs would take them for times.
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache, "FLA_CACHE_RESULTS": "0"}))
        if INTERPRETED:
            _complete_interpreter(stack)
        driver.set_active(_Driver(chip, processors))
        try:
            with _CallsItselfCuda():
                yield
        finally:
            driver._active = previous


class _Driver:
    """What libraries ask of Triton's driver."""

    def __init__(self, chip: int, processors: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", chip, 32)
        self._properties = {
            "multiprocessor_count": processors,
            "max_shared_mem": SHARED_MEMORY[chip],
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda index: self._properties)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _CUDA


def _answers(chip: int, processors: int) -> dict[str, Any]:
    """What libraries ask of ``torch.cuda``."""
    capability = divmod(chip, 10)
    properties = SimpleNamespace(
        name=_NAMES[chip],
        major=capability[0],
        minor=capability[1],
        multi_processor_count=processors,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=SHARED_MEMORY[chip],
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: _NAMES[chip],
        "get_device_properties": lambda device=None: properties,
        "device": lambda device: nullcontext(),
    }


class _CallsItselfCuda(TorchFunctionMode):
    """CPU tensors that say they are on a GPU; what is asked for on the GPU is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return _CUDA
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.autograd.grad:
            with self:  # a mode is off while it answers, and the backward pass is the library's code too
                return _gradients(*args, **kwargs)
        kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        if func in _WITHOUT_KERNELS and not INTERPRETED:
            return _unwritten(func, *args, **kwargs)
        return func(*map(_on_cpu, args), **kwargs)


# Where launches are only written down no value matters, and these would take the CPU minutes.
_WITHOUT_KERNELS = frozenset(
    {torch.mm, torch.addmm, torch.matmul, torch.Tensor.__matmul__, torch.nn.functional.linear, torch.Tensor.clone}
)


def _unwritten(func: Any, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """A result of the right shape and dtype that holds what the memory held."""
    if out is not None:
        return out
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    named = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    return torch.empty_like(func(*shapes, **named), device="cpu")


def _on_cpu(value: Any) -> Any:
    names_the_gpu = isinstance(value, torch.device | str) and str(value).split(":")[0] == "cuda"
    return torch.device("cpu") if names_the_gpu else value


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any, **options: Any) -> Any:
    """`torch.autograd.grad` by the engine itself, which asks no mode. A loss comes last, so its gradient is 1."""
    upstream = tuple(torch.ones_like(gradient) if gradient.dim() == 0 else gradient for gradient in grad_outputs)
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(tuple(outputs), upstream, False, False, tuple(inputs), False, accumulate_grad=False)


def _autotuned_by(tune: Tuner) -> Callable[..., Any]:
    def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configurations = self.prune_configs(kwargs)

        def try_one(index: int) -> Any:
            chosen = configurations[index].all_kwargs()
            size = grid({**self.nargs, **kwargs, **chosen}) if callable(grid) else grid
            return self.fn.run(*args, grid=size, **kwargs, **chosen)

        return tune(try_one, len(configurations))

    return run


def _complete_interpreter(stack: ExitStack) -> None:
    """What the interpreter lacks and other libraries' kernels use. Values are made up: only what moves is counted."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    def elementwise(x: Any) -> Any:
        return tl.sqrt(x)  # looked up when called, since the interpreter replaces it while a kernel runs

    def argument(value: Any) -> Any:
        return scalar(value, tl.float32, np.float32) if isinstance(value, float) else convert(value)

    def scalar(value: float, kind: Any, held_as: Any) -> Any:
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=held_as), kind), kind)

    def get_bf16(self: Any, value: float) -> Any:
        return scalar(0, tl.bfloat16, np.uint16).handle

    convert = interpreter._implicit_cvt
    stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", argument))
    stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "get_bf16", get_bf16, create=True))
    for name in ("rsqrt", "tanh", "erf", "exp", "exp2", "log1p"):
        stack.enter_context(mock.patch.object(libdevice, name, elementwise))
