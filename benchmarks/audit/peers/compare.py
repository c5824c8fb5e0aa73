"""Our audit beside a library's: figure by figure, whether ours is better, equal or worse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from tilewright.benchmarks.audit.bars import TENSOR_CORES
from tilewright.kernels.registry import SPECS

Audit = dict[str, Any]
Row = dict[str, Any]

# Ratios within half a percent are equal. The small samples have few rows for one processor, where what a program reads
# and writes once (a norm's weight, its share of the weight's gradient) weighs more than at the real size.
ALLOWANCE = 0.005

_COMPUTE_BOUND = frozenset(spec.name for spec in SPECS if spec.matmuls)


class Place(NamedTuple):
    """Where a figure belongs."""

    op: str
    sample: str
    chip: int


def compare(ours: Audit, theirs: Audit) -> list[Row]:
    """Every figure that both audits have of one op, sample, chip and pass. Smaller is better.

    Where one read of the inputs can serve both passes, libraries divide the work between the passes as they like, and
    the passes are compared together.

    Args:
        ours: the audit of our ops.
        theirs: the audit of a library, as `peers.audit` gives it.

    Returns:
        Rows of ``op``, ``sample``, ``chip``, ``pass``, ``peer``, ``figure``, ``ours``, ``theirs`` and ``verdict``:
        "better", "equal" or "worse". ``bytes issued ÷ compulsory`` divides both by our op's compulsory bytes.
    """
    mine, other = _Figures(ours), _Figures(theirs)
    rows: list[Row] = []
    for place in other.places():
        for name in mine.passes(place):
            for figure, (a, b) in _pairs(mine, other, place, name):
                where = {**place._asdict(), "pass": name, "peer": theirs["peer"]}
                shown = {"figure": figure, "ours": _rounded(a), "theirs": _rounded(b)}
                rows.append({**where, **shown, "verdict": _verdict(place, a, b)})
    return rows


def _pairs(mine: _Figures, other: _Figures, place: Place, name: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    kernels = mine.kernels(place, name), other.kernels(place, name)
    if all(kernels):
        yield "spills", (_spills(kernels[0]), _spills(kernels[1]))
        yield "stack bytes", (_stack(kernels[0]), _stack(kernels[1]))
        if place.op in _COMPUTE_BOUND and name != "both":
            yield "tensor cores", (_tensor_cores(kernels[0]), _tensor_cores(kernels[1]))
    moved = mine.traffic(place, name), other.traffic(place, name)
    if all(row.get("bytes_issued") is not None for row in moved):
        if place.op in _COMPUTE_BOUND:
            # Blocks of keys and values are read again by every program, from caches: no bytes that a roofline knows.
            yield "FLOPs issued", (moved[0]["flops_issued"], moved[1]["flops_issued"])
        else:
            compulsory = moved[0]["bytes_compulsory"]
            ratios = moved[0]["bytes_issued"] / compulsory, moved[1]["bytes_issued"] / compulsory
            yield "bytes issued ÷ compulsory", ratios
        floors = mine.floor(place, name), other.floor(place, name)
        if None not in floors:
            yield "predicted floor, µs", floors


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _spills(kernels: list[Row]) -> int:
    return sum(kernel["spill_loads"] + kernel["spill_stores"] for kernel in kernels)


def _stack(kernels: list[Row]) -> int:
    return max(int(kernel["stack_bytes"]) for kernel in kernels)


def _tensor_cores(kernels: list[Row]) -> str:
    return ", ".join(sorted({kind for kernel in kernels for kind in kernel["tensor_cores"]}))


def _verdict(place: Place, ours: Any, theirs: Any) -> str:
    if isinstance(ours, str):
        ours, theirs = (TENSOR_CORES[place.chip] not in kinds for kinds in (ours, theirs))
    if ours > theirs * (1 + ALLOWANCE if isinstance(ours, float) else 1):
        return "worse"
    return "better" if theirs > ours * (1 + ALLOWANCE if isinstance(ours, float) else 1) else "equal"


class _Figures:
    """An audit by place and pass."""

    def __init__(self, audit: Audit) -> None:
        self._kernels: dict[tuple[Place, str], dict[str, Row]] = defaultdict(dict)
        for launch in audit["launches"]:
            place, own = _key(launch)
            for name in (own, "both"):
                self._kernels[place, name][launch["kernel"]] = audit["kernels"][launch["kernel"]]
        self._traffic = {_key(row): row for row in audit["traffic"]}
        self._floors = {_key(row): row for row in audit.get("floors", [])}
        self._failed = {_place(error) for error in audit.get("errors", [])}

    def places(self) -> list[Place]:
        """Those without an error: a launch that does not fit the chip has figures, and they are worth nothing."""
        known = dict.fromkeys(place for place, _ in (*self._kernels, *self._traffic))
        return [place for place in known if place not in self._failed]

    def passes(self, place: Place) -> tuple[str, ...]:
        """The passes that can be told apart."""
        row = self.traffic(place, "forward")
        return ("both",) if row and row["byte_ratio"] is None else ("forward", "backward", "both")

    def kernels(self, place: Place, name: str) -> list[Row]:
        return list(self._kernels.get((place, name), {}).values())

    def traffic(self, place: Place, name: str) -> Row:
        found: Row = self._traffic.get((place, name), {})
        return found

    def floor(self, place: Place, name: str) -> float | None:
        microseconds: float | None = self._floors.get((place, name), {}).get("predicted_microseconds")
        return microseconds


def _key(row: Row) -> tuple[Place, str]:
    return _place(row), row["pass"]


def _place(row: Row) -> Place:
    return Place(row["op"], row["sample"], row["chip"])
