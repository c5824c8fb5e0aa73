"""Counts the bytes and floating-point operations that Triton kernels issue, in Triton's interpreter.

Which elements a kernel loads, stores and multiplies follows from its grid, its integers and its masks. So only integers
are computed (`builder.py`): a kernel that would run past the end of its tensors is counted and does no harm.

A loop is not run from end to end where its first, middle and last turns issue the same: those between then do too, as
masks that compare a place with an end change once along it. Where they differ, the halves are looked at in the same
way. `loops.py` says which loops are left alone. Of a grid's programs too only a few are run where those issue the same.
This makes the shapes of real models countable in minutes; that nothing is lost is tested against running every turn.

What PyTorch's own operations move between the launches counts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction, ReduceOps, ScanOps

from tilewright.benchmarks.audit.builder import CountingBuilder, counting_builder, reduction, scan
from tilewright.benchmarks.audit.issue import Counts, Issued, difference
from tilewright.benchmarks.audit.loops import LoopRewriter
from tilewright.kernels.library import Op

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm"})
_WITHOUT_DATA = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_"})
# These do not read their first argument.
_OVERWRITING = frozenset(
    {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "zeros_like", "ones_like", "new_zeros", "new_ones"}
)


class TorchProduct(Exception):
    """The op leaves its matrix products to PyTorch, whose kernels cannot be seen from here."""


@contextmanager
def counting(every_turn: bool = False) -> Iterator[Issued]:
    """Count what kernels launched inside the ``with`` block issue, and what PyTorch's own operations move there.

    Floating-point results are not computed. Two launches that differ in nothing which the count depends on are carried
    out once.

    Args:
        every_turn: run loops from end to end, and all programs.
    """
    issued = Issued()
    ready: set[Any] = set()
    with (
        counting_builder(issued, every_turn) as builder,
        patch.object(ReduceOps, "apply_impl", reduction(issued, ReduceOps.apply_impl)),
        patch.object(ScanOps, "apply_impl", scan(issued, ScanOps.apply_impl)),
        patch.object(FunctionRewriter, "ast_transformer", LoopRewriter()),
        patch.object(InterpretedFunction, "rewritten_fn", {}),
        patch.object(InterpretedFunction, "run", _run_once(builder, InterpretedFunction.run, ready)),
        patch.object(InterpretedFunction, "__call__", _call(InterpretedFunction.__call__, ready)),
        _TorchTraffic(issued) as traffic,
        patch.object(Op, "__call__", _unwatched(Op.__call__)),
        patch.object(Op, "launch", _watched_launch(traffic), create=True),
    ):
        yield issued


def _call(original: Callable[..., Any], ready: set[Any]) -> Callable[..., Any]:
    """A call from inside a kernel, which puts the interpreter in the language's place at a launch's first call only: to
    do so at each takes half of all time."""

    def call(self: Any, *args: Any, **named: Any) -> Any:
        if self.fn in ready:
            return self.rewrite()(*args, **named)
        ready.add(self.fn)
        return original(self, *args, **named)

    return call


def _run_once(builder: CountingBuilder, original: Callable[..., Any], ready: set[Any]) -> Callable[..., Any]:
    """Launches are carried out once for all that are alike, but for those that leave integers behind."""
    counted: dict[Hashable, Counts] = {}
    issued = builder.issued

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        issued.kernels.append(self.__name__)
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args, strict=False)), **named})
        ready.clear()
        before = issued.counts

        def launch(smaller: tuple[int, ...]) -> None:
            original(self, *args, grid=smaller, warmup=warmup, **named)

        # NumPy's warnings would be about no real number. What the interpreter itself moves between its copies of the
        # tensors is not the kernel's.
        with np.errstate(all="ignore"), _disable_current_modes():
            key = _alike(self.fn, grid, args, named)
            if key in counted:
                issued.add(counted[key])
            else:
                _run_programs(builder, launch, tuple(grid))
                if key == _alike(self.fn, grid, args, named):
                    counted[key] = difference(issued.counts, before)
        issued.kernel_bytes[self.__name__] += issued.counts[0] - before[0]

    return run


def _run_programs(builder: CountingBuilder, launch: Callable[..., None], grid: tuple[int, ...]) -> None:
    """Run a few programs from one end of the grid to the other, and the rest where those do not issue the same."""
    programs = math.prod(grid)
    few = sorted({part * (programs - 1) // 4 for part in range(5)}) if programs else []
    found = builder.run_programs(launch, grid, few)
    if len(found) == 1 and not builder.every_turn and not (counts := next(iter(found)))[-1]:
        builder.issued.add(counts, programs - len(few))
    else:
        builder.run_programs(launch, grid, sorted(set(range(programs)) - set(few)))


def _alike(function: Any, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Hashable:
    """What two launches must share to issue the same: all but the values of floating-point numbers."""
    seen: list[Hashable] = []
    for argument in (*args, *named.values()):
        if not isinstance(argument, torch.Tensor):
            # Numbers, and functions that the kernel calls; what has no hash is like itself alone.
            seen.append((type(argument), argument if isinstance(argument, Hashable) else object()))
        elif argument.is_floating_point():
            seen.append(argument.dtype)
        else:
            seen.append((argument.dtype, argument.contiguous().numpy().tobytes()))
    return function, tuple(grid), len(args), tuple(named), tuple(seen)


def _unwatched(original: Callable[..., Any]) -> Callable[..., Any]:
    """Our ops take another path where a dispatch mode looks on; what is to be counted is what they do else."""

    def call(self: Op, *args: Any) -> Any:
        with _disable_current_modes():
            return original(self, *args)

    return call


def _watched_launch(traffic: _TorchTraffic) -> property:
    """`Op.launch`, in which PyTorch's operations count."""

    def launch_of(self: Op) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            with traffic:
                return self.__dict__["launch"](*args)

        return launch

    return property(launch_of)


class _TorchTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what PyTorch's own operations move: each tensor read once, each result written once."""

    def __init__(self, issued: Issued) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.issued = issued

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        if name in _PRODUCTS:
            raise TorchProduct(name)
        result = function(*args, **kwargs)
        if name not in _WITHOUT_DATA and not function.is_view:
            destination = args[:1] if name in _OVERWRITING else ()
            read = sum(_nbytes(x) for x in args if not any(x is overwritten for overwritten in destination))
            self.issued.bytes += read + _nbytes(result)
        return result


def _nbytes(x: Any) -> int:
    """Bytes of the tensors in `x`; elements that an expanded tensor repeats are there once."""
    if isinstance(x, torch.Tensor):
        sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
        return math.prod(sizes) * x.element_size()
    return sum(map(_nbytes, x)) if isinstance(x, (tuple, list)) else 0
