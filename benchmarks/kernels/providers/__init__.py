"""Who computes an op: Tilewright, plain PyTorch, PyTorch's compiler and fused ops, and packages that may be installed.

A provider is a line in `PROVIDERS`; a package's ops are a file here with a table `OPS` from our op's name to a function
of our op's signature. Such a function raises `NotServed` for options that the package lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tilewright.benchmarks.kernels.providers import apex, flash_attn, liger, torch_fused
from tilewright.benchmarks.kernels.providers.missing import NotServed
from tilewright.kernels import choose
from tilewright.kernels.attention import SPEC as ATTENTION
from tilewright.kernels.flash_attention import choose_attention
from tilewright.kernels.opspec import OpSpec, Sample

Function = Callable[..., Any]

__all__ = ["PROVIDERS", "NotServed", "Provider", "implementation_of"]


class Provider(NamedTuple):
    """Who computes an op.

    Attributes:
        function_of: the function of an op on a device, of the op's own signature; raises `NotServed`, in words why.
        compiles_on: the types of device on which its first call compiles: Inductor's graphs, or Triton's kernels.
        overwrites: it may write into its inputs, so they are its own.
    """

    function_of: Callable[[OpSpec, torch.device], Function]
    compiles_on: tuple[str, ...] = ()
    overwrites: bool = False


def _compiled(function: Function) -> Function:
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _from(name: str, ops: dict[str, Function], ready: Callable[[torch.device], None]) -> Callable[..., Function]:
    def function_of(spec: OpSpec, device: torch.device) -> Function:
        if spec.name not in ops:
            raise NotServed(f"{name} has no {spec.name}")
        ready(device)
        return ops[spec.name]

    return function_of


# In the order of the tables. The compiled ones follow what they compile, so that what both share is compiled for ours.
PROVIDERS: dict[str, Provider] = {
    "ours": Provider(lambda spec, device: spec.function, compiles_on=("cuda",)),
    "ours compiled": Provider(lambda spec, device: _compiled(spec.function), compiles_on=("cpu", "cuda")),
    "torch eager": Provider(lambda spec, device: spec.reference),
    "torch.compile": Provider(lambda spec, device: _compiled(spec.reference), compiles_on=("cpu", "cuda")),
    "torch fused": Provider(_from("PyTorch", torch_fused.OPS, torch_fused.ready), overwrites=True),
    "liger-kernel": Provider(_from("liger-kernel", liger.OPS, liger.ready), compiles_on=("cuda",), overwrites=True),
    "flash-attn": Provider(_from("flash-attn", flash_attn.OPS, flash_attn.ready)),
    "apex": Provider(_from("apex", apex.OPS, apex.ready), overwrites=True),
}


def implementation_of(name: str, spec: OpSpec, sample: Sample, device: torch.device) -> str:
    """What serves this call, and why, as in "reference: off CUDA, …"; for others than ours, the provider itself."""
    if not name.startswith("ours"):
        return name
    first = next(x for x in sample.tensors.values() if x.is_floating_point())
    if spec is ATTENTION:
        arguments: dict[str, Any] = {**sample.tensors, **sample.options}
        choice = choose_attention(**arguments)
    else:
        choice = choose(device, first.dtype)
    return f"{choice.implementation}: {choice.reason}"
