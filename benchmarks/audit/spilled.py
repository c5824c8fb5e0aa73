"""What registers that a kernel spills add to the bytes that it issues.

The interpreter knows no registers, so its count leaves out what a kernel writes to local memory, and reads again,
because it has too few. The code knows: in a turn of its hottest loop a thread moves so many bytes of spilled registers
beside so many of the tensors, and by that share the kernel issues more than was counted. Local memory is device memory
behind the caches; as with a tensor that is read twice, an access that a cache answers counts too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

Row = dict[str, Any]


def with_spills(found: Row) -> Row:
    """The audit with ``bytes_spilled`` in its ``traffic``, added to ``bytes_issued`` and ``byte_ratio`` there.

    Args:
        found: ``traffic``, as counted at a small size, and what the compiler made of the same samples at the real one:
            ``launches`` and their ``kernels``.
    """
    shares: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for launch in found["launches"]:
        kernel = found["kernels"][launch["kernel"]]
        name, loop = kernel["kernel"].rpartition(".")[2], kernel["hottest_loop"]
        share = loop["spilled_bytes"] / loop["global_bytes"] if loop["global_bytes"] else 0.0
        known = shares[launch["op"], launch["sample"], launch["chip"]]
        # A launch that spills more than another of the same kernel is given the benefit of the doubt.
        known[name] = min(share, known.get(name, share))
    rows = [_with_spills(row, shares[row["op"], row["sample"], row["chip"]]) for row in found["traffic"]]
    return {**found, "traffic": rows}


def _with_spills(row: Row, shares: dict[str, float]) -> Row:
    spilled = round(sum(shares.get(name, 0.0) * moved for name, moved in row["kernel_bytes"].items()))
    if not spilled:
        return {**row, "bytes_spilled": 0}
    issued = row["bytes_issued"] + spilled
    ratio = issued / row["bytes_compulsory"] if row["byte_ratio"] is not None else None
    return {**row, "bytes_issued": issued, "bytes_spilled": spilled, "byte_ratio": ratio}
