"""What another library's kernels become and issue: the process that asks, one for a library, a chip and an instrument.

``main`` prints JSON lines as `compiled` and `issued` do of our own ops: what the compiler made of the launches, or,
with ``TRITON_INTERPRET=1``, what they issue.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from tilewright.benchmarks.audit import compiled
from tilewright.benchmarks.audit.peers.counterpart import specs_of
from tilewright.benchmarks.audit.peers.stand_in import Tuner, standing_in_for
from tilewright.kernels.ahead_of_time import captured_launches, launches_of
from tilewright.kernels.dispatch import INTERPRETED
from tilewright.kernels.launch import PROCESSORS
from tilewright.kernels.opspec import OpSpec


def main() -> None:
    """Print the findings on the library and the chip that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", help="the library's name on PyPI")
    parser.add_argument("chip", type=int, help="a generation, such as 90")
    parser.add_argument("ops", nargs="*", help="all where none is named")
    arguments = parser.parse_args()
    for finding in findings(arguments.peer, arguments.chip, arguments.ops):
        print(json.dumps(finding), flush=True)


def findings(peer: str, chip: int, ops: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """What this process's instrument finds of the counterparts of the named ops, of all where none is named."""
    if INTERPRETED:
        from tilewright.benchmarks.audit import issued

        # One processor, as our own ops are counted. Configurations to choose from differ in how they divide the work
        # among blocks, not in what they move: the first shows it.
        with standing_in_for(chip, processors=1, tune=lambda try_one, count: try_one(0)):
            yield from issued.findings(specs_of(peer, ops), [chip])
    else:
        with standing_in_for(chip, PROCESSORS[chip], tune=_fewest_spills(chip)):
            yield from _compiled(specs_of(peer, ops), chip)


def _compiled(specs: tuple[OpSpec, ...], chip: int) -> Iterator[dict[str, Any]]:
    launches = (
        (spec.name, label, launch) for spec in specs for label, launch in launches_of(spec, torch.bfloat16, chip)
    )
    kernels = compiled.distinct_kernels(launches)
    yield {"total": len(kernels)}
    for kernel in kernels:
        yield from compiled.findings(kernel)


def _fewest_spills(chip: int) -> Tuner:
    """In place of a clock: the first configuration that does not spill, else the one that spills least.

    That is the best that can be said for the library without a GPU, and no worse than what its own timing would find.
    """
    known: dict[str, tuple[float, float]] = {}

    def cost(try_one: Callable[[int], Any], index: int) -> tuple[float, float]:
        with captured_launches(chip) as tried:
            try_one(index)
        compilation = tried[0].compilation()
        if compilation.key not in known:
            known[compilation.key] = _spills(compilation)
        return known[compilation.key]

    def tune(try_one: Callable[[int], Any], count: int) -> Any:
        best, least = 0, (float("inf"), float("inf"))
        for index in range(count):
            found = cost(try_one, index)
            if found < least:
                best, least = index, found
            if least == (0, 0):
                break
        return try_one(best)

    return tune


def _spills(compilation: Any) -> tuple[float, float]:
    try:
        figures = compiled.examine(compilation)
    except Exception:  # as triton.autotune passes over a configuration that does not compile
        return float("inf"), float("inf")
    if figures["blocks_per_processor"] == 0:
        return float("inf"), float("inf")
    return figures["spill_loads"] + figures["spill_stores"], figures["stack_bytes"]
