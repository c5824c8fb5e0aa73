"""Compile the kernels that an op launches for a GPU that this machine does not have.

`captured_launches` lets an op run on CPU tensors while every kernel launch is written down instead of carried out;
each `Launch` then compiles for the generation it was chosen for. What is compiled is what the op's own host code would
launch, its argument types and alignments included, so nothing is stated twice.

Needs a process without ``TRITON_INTERPRET``, which replaces the kernels by interpreted ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.kernels.dispatch import INTERPRETED, use
from tilewright.kernels.launch import as_if_on
from tilewright.kernels.opspec import OpSpec

# Shared memory that one block may take, in bytes (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compilation:
    """What the compiler is given for a launch: launches whose compilations have one key run the same code."""

    name: str
    chip: int
    source: Any
    options: Any

    @property
    def key(self) -> str:
        """Alike for what Triton's own cache holds to be the same code, in hexadecimal digits."""
        seen = f"{self.name}-{self.chip}-{self.source.hash()}-{self.options.hash()}"
        return hashlib.sha256(seen.encode()).hexdigest()

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's declared constexprs by name, block sizes among them."""
        parameters = self.source.fn.params
        return {
            parameters[path[0]].name: value
            for path, value in self.source.constants.items()
            if len(path) == 1 and parameters[path[0]].is_constexpr
        }

    def compile(self) -> Any:
        """Triton's ``CompiledKernel``: its ``asm`` by stage and its ``metadata``."""
        import triton
        from triton.backends.compiler import GPUTarget

        return triton.compile(self.source, target=GPUTarget("cuda", self.chip, 32), options=dict(self.options.__dict__))


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid, and its arguments as the compiler sees them.

    `backward` says whether autograd's backward pass made it.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    chip: int
    backward: bool = False

    @property
    def name(self) -> str:
        """The kernel's file and name, such as ``rms_norm._forward``."""
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__}"

    def compilation(self) -> Compilation:
        """What the compiler is given, without the launch's tensors."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        target = GPUTarget("cuda", self.chip, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        options = {"debug": False, **self.options}
        bound, specialization, _ = binder(*self.args, **options)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        return Compilation(self.name, self.chip, ASTSource(self.kernel, signature, constants, attributes), parsed)

    def compile(self) -> Any:
        """Triton's ``CompiledKernel`` for the launch's generation: its ``asm`` by stage and its ``metadata``."""
        return self.compilation().compile()


@contextmanager
def captured_launches(chip: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside the ``with`` block, as on a GPU of generation `chip`; none is carried out.

    Raises:
        RuntimeError: the process interprets kernels, so there is nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError(
            "kernels are interpreted in this process; start one without TRITON_INTERPRET to compile them"
        )
    from triton.runtime import JITFunction

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        in_backward = torch._C._current_graph_task_id() >= 0
        launches.append(Launch(self, tuple(grid), args, options, chip, in_backward))

    original = JITFunction.run
    JITFunction.run = record
    try:
        with as_if_on(chip), use("triton"):
            yield launches
    finally:
        JITFunction.run = original


def launches_of(spec: OpSpec, dtype: torch.dtype, chip: int) -> list[tuple[str, Launch]]:
    """Every launch that forward and backward of `spec` make at its audit shapes, with the shape's label."""
    found: list[tuple[str, Launch]] = []
    for sample in spec.audit_samples(dtype, False):
        with captured_launches(chip) as launches:
            names = spec.differentiable(sample)
            for name in names:
                sample.tensors[name].requires_grad_()
            results = spec.function(**sample.tensors, **sample.options)
            results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
            if names:
                upstream = [torch.empty_like(r) for r in results]
                torch.autograd.grad(results, [sample.tensors[name] for name in names], upstream)
        found.extend((sample.label, launch) for launch in launches)
    return found
