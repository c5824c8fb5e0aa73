"""Compile every launch of every op for GPUs that are not there, and say what the compiler made of each.

``main`` runs in a process of its own, without ``TRITON_INTERPRET``, and prints one JSON object a line: ``total``, how
many kernels are to be compiled; then for each kernel, compiled once, ``kernel`` with its figures and a ``launch`` for
each time that an op launches it; or an ``error`` for each launch that cannot be compiled or cannot run on the chip.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from tilewright.benchmarks.audit import sass
from tilewright.benchmarks.audit.chips import CHIPS, occupancy
from tilewright.kernels.ahead_of_time import Compilation, Launch, launches_of
from tilewright.kernels.registry import SPECS

Finding = dict[str, Any]


class Kernel(NamedTuple):
    """What the compiler is given, and every launch of it: op, sample, chip, pass and grid."""

    compilation: Compilation
    launches: list[Finding]


def main() -> None:
    """Print the findings on the ops, chips and share of the work that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="names of ops; all where none is named")
    parser.add_argument("--chips", default="80,90", help="generations, such as 80,90,100")
    parser.add_argument("--share", default="0/1", help="which part of the kernels of how many, such as 1/2")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.share.split("/"))
    # Of its own, so that what an earlier run compiled does not hide how long compiling takes.
    with tempfile.TemporaryDirectory(prefix="tilewright-audit-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        kernels = distinct_kernels(audited_launches(arguments.ops, [int(chip) for chip in arguments.chips.split(",")]))
        kernels = kernels[part::parts]
        print(json.dumps({"total": len(kernels)}), flush=True)
        for kernel in kernels:
            for finding in findings(kernel):
                print(json.dumps(finding), flush=True)


def audited_launches(ops: Iterable[str], chips: Iterable[int]) -> Iterator[tuple[str, str, Launch]]:
    """Every launch of the named ops' specs, of all ops where none is named: op, sample's label, launch."""
    names = list(ops) or [spec.name for spec in SPECS]
    for spec in SPECS:
        if spec.name in names:
            for chip in chips:
                yield from ((spec.name, label, launch) for label, launch in launches_of(spec, torch.bfloat16, chip))


def distinct_kernels(launches: Iterable[tuple[str, str, Launch]]) -> list[Kernel]:
    """The launches, gathered under what the compiler makes one kernel of; the launches' tensors are let go."""
    kernels: dict[str, Kernel] = {}
    for op, label, launch in launches:
        compilation = launch.compilation()
        where = {
            "op": op,
            "sample": label,
            "chip": launch.chip,
            "pass": "backward" if launch.backward else "forward",
            "kernel": identity(compilation),
            "grid": list(launch.grid),
        }
        kernels.setdefault(compilation.key, Kernel(compilation, [])).launches.append(where)
    return list(kernels.values())


def identity(compilation: Compilation) -> str:
    """A short name of one kernel's code, for launches to refer to."""
    return f"{compilation.name}-{compilation.chip}-{compilation.key[:8]}"


def findings(kernel: Kernel) -> Iterator[Finding]:
    """What is to be printed of one kernel."""
    try:
        figures = examine(kernel.compilation)
    except Exception as error:  # whatever the compiler raises is a finding about this kernel, and the others go on
        message = " ".join(f"{type(error).__name__}: {error}".split())
        yield from (_error(kernel, launch, message[:500]) for launch in kernel.launches)
        return
    yield {"kernel": {"id": identity(kernel.compilation), **figures}}
    yield from ({"launch": launch} for launch in kernel.launches)
    if figures["blocks_per_processor"] == 0:
        chip = CHIPS[kernel.compilation.chip]
        message = f"no block fits a multiprocessor of {chip.name}: its {figures['limited_by']} are too few"
        if figures["shared_bytes"] > chip.shared_memory_per_block:
            message = (
                f"a block takes {figures['shared_bytes']:,} bytes of shared memory, and {chip.name} gives a block "
                f"{chip.shared_memory_per_block:,}"
            )
        yield from (_error(kernel, launch, message) for launch in kernel.launches)


def _error(kernel: Kernel, launch: Finding, message: str) -> Finding:
    return {"error": {**launch, "kernel": kernel.compilation.name, "message": message}}


def examine(compilation: Compilation) -> Finding:
    """Compile, and read every figure off the code.

    Raises:
        Exception: whatever the compiler raises.
    """
    started = time.perf_counter()
    compiled = compilation.compile()
    seconds = time.perf_counter() - started
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    registers, stack_bytes = sass.resources(cubin)
    code = sass.disassemble(cubin)
    resident = occupancy(
        CHIPS[compilation.chip], warps=metadata.num_warps, registers=registers, shared_memory=metadata.shared
    )
    accesses, wide = code.global_accesses()
    loop = code.hottest_loop()
    return {
        "kernel": compilation.name,
        "chip": compilation.chip,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "constants": {name: _plain(value) for name, value in compilation.constants.items()},
        "registers": registers,
        "stack_bytes": stack_bytes,
        "spill_loads": code.count("LDL"),
        "spill_stores": code.count("STL"),
        "shared_bytes": metadata.shared,
        "blocks_per_processor": resident.blocks,
        "occupancy": resident.share,
        "limited_by": resident.limited_by,
        "global_accesses": accesses,
        "wide_accesses": wide,
        "tensor_cores": code.tensor_cores(),
        "hottest_loop": loop._asdict(),
        "compile_seconds": round(seconds, 3),
    }


def _plain(value: Any) -> Any:
    """A constant as JSON takes it; types and functions by their name."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
