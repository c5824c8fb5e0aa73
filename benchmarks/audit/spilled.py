"""What registers that a kernel spills add to the bytes that it issues.

The interpreter knows no registers, so its count leaves out what a kernel writes to and reads from local memory because
it has too few. The code knows: in a turn of its hottest loop a thread moves so many bytes of spilled registers beside
so many of the tensors, and by that share the kernel issues more than was counted.

Local memory is device memory behind the caches. Where the stacks of all resident threads together fit the L2 cache,
spilled registers are taken to stay there, and add nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from tilewright.benchmarks.audit.chips import CHIPS

Row = dict[str, Any]
_THREADS = 32  # of a warp


def with_spills(found: Row) -> Row:
    """The audit with ``bytes_spilled`` in its ``traffic``, added to ``bytes_issued`` and ``byte_ratio`` there.

    Args:
        found: ``traffic``, as counted at a small size, and what the compiler made of the same samples at the real one:
            ``launches`` and their ``kernels``.
    """
    shares: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for launch in found["launches"]:
        kernel = found["kernels"][launch["kernel"]]
        name, share = kernel["kernel"].rpartition(".")[2], spilled_share(kernel, launch)
        known = shares[launch["op"], launch["sample"], launch["chip"]]
        known[name] = min(share, known.get(name, share))
    rows = [_with_spills(row, shares[row["op"], row["sample"], row["chip"]]) for row in found["traffic"]]
    return {**found, "traffic": rows}


def spilled_share(kernel: Row, launch: Row) -> float:
    """Bytes of spilled registers that go to device memory, as a fraction of the tensors' bytes in the hottest loop."""
    loop, chip = kernel["hottest_loop"], CHIPS[launch["chip"]]
    resident = min(math.prod(launch["grid"]), kernel["blocks_per_processor"] * chip.processors)
    stacks = kernel["stack_bytes"] * kernel["num_warps"] * _THREADS * resident
    if stacks <= chip.l2_cache or not loop["global_bytes"]:
        return 0.0
    return float(loop["spilled_bytes"] / loop["global_bytes"])


def _with_spills(row: Row, shares: dict[str, float]) -> Row:
    spilled = round(sum(shares.get(name, 0.0) * moved for name, moved in row["kernel_bytes"].items()))
    if not spilled:
        return {**row, "bytes_spilled": 0}
    issued = row["bytes_issued"] + spilled
    ratio = issued / row["bytes_compulsory"] if row["byte_ratio"] is not None else None
    return {**row, "bytes_issued": issued, "bytes_spilled": spilled, "byte_ratio": ratio}
