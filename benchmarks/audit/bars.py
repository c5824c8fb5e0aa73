"""The bars that an audit must clear, as data; each is judged by its worst row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Audit = dict[str, Any]
Row = dict[str, Any]

# Rows up to this many elements, and classes up to that many, can be held by one program.
_WIDTH, _CLASSES = 8192, 32768
_MEMORY_BOUND = ("rms_norm", "layer_norm", "rotary", "swiglu", "adamw")
_WITH_WIDE_ROWS = ("rms_norm", "layer_norm", "swiglu")
_BOTH_WAYS = ("forward", "backward")
# What each generation's own tensor-core instruction is called; an older one's run, at half the rate or less.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class Figure(NamedTuple):
    """One row's figure, and where it stands."""

    value: float
    row: str
    part: str = ""  # the pass, where the bar asks for passes


@dataclass(frozen=True)
class Bar:
    """What must hold of every row that `figures` finds: at most `bound`.

    Attributes:
        name: as it is printed.
        figures: finds the rows in an audit. Of an audit of chosen ops it finds those of the chosen ones.
        bound: the largest figure allowed.
        ops: the ops that it is about; all where empty. It is not asked where none of them was audited.
        passes: those that must have a row each.
    """

    name: str
    figures: Callable[[Audit], Iterator[Figure]]
    bound: float
    ops: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """How a bar was met: whether (None: not asked), in how many rows, and the worst of them."""

    bar: Bar
    met: bool | None
    rows: int
    worst: Figure | None


def verdicts(audit: Audit) -> list[Verdict]:
    """Every bar, judged."""
    return [_judge(bar, audit) for bar in BARS]


def _judge(bar: Bar, audit: Audit) -> Verdict:
    if bar.ops and not set(bar.ops) & set(audit["ops"]):
        return Verdict(bar, None, 0, None)
    figures = list(bar.figures(audit))
    if not figures:
        # A bar about an op that was audited, and which no row of it was held to, is not met.
        return Verdict(bar, None if not bar.ops else False, 0, None)
    worst = max(figures, key=lambda figure: figure.value)
    missing = set(bar.passes) - {figure.part for figure in figures}
    if missing and worst.value <= bar.bound:
        return Verdict(
            bar, False, len(figures), worst._replace(row=f"no row of the {' and '.join(sorted(missing))} pass")
        )
    return Verdict(bar, worst.value <= bar.bound, len(figures), worst)


def _spills_of_memory_bound(audit: Audit) -> Iterator[Figure]:
    for row, kernel in _launches(audit):
        if not audit["ops"][row["op"]]["matmuls"]:
            yield Figure(kernel["spill_loads"] + kernel["spill_stores"] + kernel["stack_bytes"], _place(row, kernel))


def _spills_of_attention(audit: Audit) -> Iterator[Figure]:
    for row, kernel in _launches(audit):
        if row["op"] == "attention" and kernel["constants"].get("HEAD_DIM") in (64, 128):
            yield Figure(kernel["spill_loads"] + kernel["spill_stores"], _place(row, kernel))


def _without_tensor_cores(audit: Audit) -> Iterator[Figure]:
    """1 for each launch of a kernel with matrix products whose instructions are not the chip's own, and for each such
    kernel that is never launched."""
    expected = {(op, kernel) for op, facts in audit["ops"].items() for kernel in facts["matmuls"]}
    for row, kernel in _launches(audit):
        name = kernel["kernel"].rpartition(".")[2]
        if name in audit["ops"][row["op"]]["matmuls"]:
            expected.discard((row["op"], name))
            yield Figure(float(set(kernel["tensor_cores"]) != {TENSOR_CORES[row["chip"]]}), _place(row, kernel))
    yield from (Figure(1.0, f"{op}: {name} is never launched") for op, name in sorted(expected))


def _bytes_up_to(ops: tuple[str, ...], width: int) -> Callable[[Audit], Iterator[Figure]]:
    return lambda audit: _ratios(audit, "byte_ratio", lambda row: row["op"] in ops and row["width"] <= width)


def _bytes_past(ops: tuple[str, ...], width: int) -> Callable[[Audit], Iterator[Figure]]:
    return lambda audit: _ratios(audit, "byte_ratio", lambda row: row["op"] in ops and row["width"] > width)


def _causal_flops(length: str) -> Callable[[Audit], Iterator[Figure]]:
    def of_length(row: Row) -> bool:
        return row["op"] == "attention" and row["pass"] != "both" and str(row["sample"]).endswith(f" {length}")

    return lambda audit: _ratios(audit, "flop_ratio", of_length)


def _worse_than_peers(audit: Audit) -> Iterator[Figure]:
    for row in audit.get("comparison", []):
        place = f"{row['op']} {row['sample']} sm_{row['chip']} {row['pass']}, {row['figure']}"
        yield Figure(
            float(row["verdict"] == "worse"), f"{place}: {row['ours']} against {row['peer']}'s {row['theirs']}"
        )


def _launches(audit: Audit) -> Iterator[tuple[Row, Row]]:
    for row in audit["launches"]:
        yield row, audit["kernels"][row["kernel"]]


def _ratios(audit: Audit, figure: str, chosen: Callable[[Row], bool]) -> Iterator[Figure]:
    for row in audit["traffic"]:
        if row[figure] is not None and chosen(row):
            yield Figure(row[figure], f"{row['op']} {row['sample']} sm_{row['chip']} {row['pass']}", row["pass"])


def _place(row: Row, kernel: Row) -> str:
    return f"{kernel['kernel']} {row['sample']} sm_{row['chip']}"


BARS = (
    Bar("spills and stack, memory-bound ops", _spills_of_memory_bound, 0),
    Bar("spills, attention, head_dim 64 and 128", _spills_of_attention, 0, ("attention",)),
    *(
        Bar(
            f"bytes issued ÷ compulsory, {op}, rows to 8,192",
            _bytes_up_to((op,), _WIDTH),
            1.05,
            (op,),
            ("forward",) if op == "adamw" else _BOTH_WAYS,
        )
        for op in _MEMORY_BOUND
    ),
    *(
        Bar(f"bytes issued ÷ compulsory, {op}, wider rows", _bytes_past((op,), _WIDTH), 1.70, (op,), _BOTH_WAYS)
        for op in _WITH_WIDE_ROWS
    ),
    Bar(
        "bytes issued ÷ compulsory, cross_entropy with gradient, V to 32,768",
        _bytes_up_to(("cross_entropy",), _CLASSES),
        1.05,
        ("cross_entropy",),
    ),
    Bar(
        "bytes issued ÷ compulsory, cross_entropy with gradient, larger V",
        _bytes_past(("cross_entropy",), _CLASSES),
        1.55,
        ("cross_entropy",),
    ),
    Bar("FLOPs issued ÷ required, causal attention, 2k", _causal_flops("2k"), 1.15, ("attention",), _BOTH_WAYS),
    Bar("FLOPs issued ÷ required, causal attention, 8k", _causal_flops("8k"), 1.05, ("attention",), _BOTH_WAYS),
    Bar("matmuls in Triton without the chip's own tensor-core instruction", _without_tensor_cores, 0),
    Bar("rows worse than a peer's", _worse_than_peers, 0),
)
