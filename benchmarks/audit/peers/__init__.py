"""The same audit for Liger-Kernel and flash-linear-attention: their kernels at our shapes, with their launch rules.

Their host code runs on CPU tensors that say they are on the GPU in question (`stand_in`); every launch it makes is
compiled, or counted in the interpreter, by the instruments that audit ours (`worker`); `compare` sets the figures side
by side. What favours them is left to them: their kernels get contiguous inputs, an autotuned launch counts by its
first configuration that does not spill, and heads that share keys are counted as if they did not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from tilewright.benchmarks.audit.audit import Task, floors, merged, run
from tilewright.benchmarks.audit.peers.compare import compare
from tilewright.benchmarks.audit.peers.counterpart import PEERS, matmuls_of, version_of
from tilewright.benchmarks.audit.spilled import with_spills
from tilewright.cli.clone import command_of
from tilewright.kernels.registry import SPECS

__all__ = ["PEERS", "audit", "compare", "version_of"]


def audit(peer: str, ops: Collection[str], chips: Sequence[int], console: Console) -> dict[str, Any]:
    """Audit a library's counterparts of our ops.

    Args:
        peer: its name on PyPI, one of `PEERS`.
        ops: ours, by name; all where none is named.
        chips: GPU generations, such as 80 and 90.
        console: where progress is shown.

    Returns:
        ``peer`` and ``version``, and as the audit of our own ops: ``kernels``, ``launches``, ``traffic``, ``errors``
        and the ``floors``, which are predicted.

    Raises:
        TrainingError: the library is unknown or not installed, or a process ends early.
    """
    version = version_of(peer)
    tasks = [
        Task(
            f"{peer} on sm_{chip}: {'bytes issued' if interpreted else 'compiling'}",
            command_of("audit.peers.worker", peer, str(chip), *ops),
            interpreted,
        )
        for interpreted in (False, True)
        for chip in chips
    ]
    found = with_spills(merged(run(tasks, console)))
    products = matmuls_of(peer)
    specs = [replace(spec, matmuls=products.get(spec.name, {})) for spec in SPECS if not ops or spec.name in ops]
    return {"peer": peer, "version": version, **found, "floors": list(floors(specs, chips, found))}
