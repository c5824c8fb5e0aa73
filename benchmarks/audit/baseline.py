"""The last accepted audit of each triton version, which the next one must not fall behind.

``benchmarks/baselines/triton-3.7.json`` holds the figures that are compared: of every launch its spills, stack,
occupancy, share of 128-bit accesses and classes of instructions, of every pass its ratios; samples with the same
figures share a line.
``CHANGELOG.md`` beside it says of each accepted audit why.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.trainer.errors import TrainingError

Audit = dict[str, Any]
Figures = dict[str, Any]

# A ratio counts as risen past this much: figures are kept to four places.
_RATIO_ALLOWANCE = 5e-4
_CHANGELOG = "CHANGELOG.md"
_CHANGELOG_HEAD = "# Why each audit was accepted\n"


class Place(NamedTuple):
    """What figures belong to: a launch, or where `kernel` is empty a whole pass."""

    op: str
    part: str  # the pass
    kernel: str
    chip: int
    sample: str

    def __str__(self) -> str:
        what = self.kernel or self.op
        return f"{what} ({self.op} {self.sample}, {self.part}, sm_{self.chip})"


class Comparison(NamedTuple):
    """What became worse, what is new, and what became better; a sentence each."""

    worse: list[str]
    new: list[str]
    better: list[str]


def path_for(directory: Path, audit: Audit) -> Path:
    """Where the baseline of the audit's triton version lies."""
    version = ".".join(audit["environment"]["triton"].split(".")[:2])
    return directory / f"triton-{version}.json"


def figures_of(audit: Audit) -> dict[Place, Figures]:
    """The figures of an audit that are compared."""
    figures: dict[Place, Figures] = {}
    for row in audit["launches"]:
        kernel = audit["kernels"][row["kernel"]]
        place = Place(row["op"], row["pass"], kernel["kernel"], row["chip"], row["sample"])
        found = _compiled(kernel)
        figures[place] = _worst(figures[place], found) if place in figures else found
    for row in audit["traffic"]:
        ratios = {name: None if row[name] is None else round(row[name], 4) for name in ("byte_ratio", "flop_ratio")}
        figures[Place(row["op"], row["pass"], "", row["chip"], row["sample"])] = ratios
    return figures


def _compiled(kernel: Mapping[str, Any]) -> Figures:
    classes = {*kernel["tensor_cores"], *(f"{name} in the loop" for name in _in_loop(kernel))}
    if kernel["wide_accesses"]:
        classes.add("128-bit accesses")
    accesses = kernel["global_accesses"]
    return {
        "spills": kernel["spill_loads"] + kernel["spill_stores"],
        "stack": kernel["stack_bytes"],
        "occupancy": round(kernel["occupancy"], 4),
        "wide_share": round(kernel["wide_accesses"] / accesses, 4) if accesses else None,
        "classes": sorted(classes),
    }


def _in_loop(kernel: Mapping[str, Any]) -> list[str]:
    mix = (kernel["hottest_loop"] or {}).get("mix", {})
    return [name for name in ("tensor", "memory") if mix.get(name)]


def _worst(one: Figures, other: Figures) -> Figures:
    """Of two launches of one kernel in one pass."""
    return {
        "spills": max(one["spills"], other["spills"]),
        "stack": max(one["stack"], other["stack"]),
        "occupancy": min(one["occupancy"], other["occupancy"]),
        "wide_share": min((x["wide_share"] for x in (one, other) if x["wide_share"] is not None), default=None),
        "classes": sorted(set(one["classes"]) & set(other["classes"])),
    }


def read(path: Path) -> dict[Place, Figures]:
    """The accepted figures.

    Raises:
        TrainingError: there are none, or the file is no baseline.
    """
    if not path.is_file():
        raise TrainingError(
            f"{path}: no audit was accepted for this triton version; look at this one, then accept it with "
            "tilewright audit --accept --why 'the reason'"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            Place(line["op"], line["pass"], line["kernel"], line["chip"], sample): line["figures"]
            for line in content["lines"]
            for sample in line["samples"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is no accepted audit ({error!r}); restore it from git") from None


def compare(audit: Audit, accepted: Mapping[Place, Figures]) -> Comparison:
    """The audit beside the accepted one, as far as the audited ops and chips go."""
    found = figures_of(audit)
    worse: list[str] = []
    better: list[str] = []
    for place, before in accepted.items():
        if place.op not in audit["ops"] or place.chip not in audit["chips"]:
            continue
        if place not in found:
            worse.append(f"{place}: it is gone")
            continue
        for sentence, is_worse in _changes(before, found[place]):
            (worse if is_worse else better).append(f"{place}: {sentence}")
    new = [f"{place}: it is new" for place in found if place not in accepted]
    return Comparison(worse, new, better)


def _changes(before: Figures, now: Figures) -> Iterable[tuple[str, bool]]:
    """What differs, and whether for the worse."""
    for name in before.keys() | now.keys():
        if name == "wide_share" and (before.get(name) is None or now.get(name) is None):
            continue  # audits accepted before it was kept have none, nor has a kernel without global accesses
        was, is_now = before.get(name), now.get(name)
        if name == "classes":
            yield from ((f"no {kind} any more", True) for kind in was or [] if kind not in (is_now or []))
            yield from ((f"{kind} now", False) for kind in is_now or [] if kind not in (was or []))
        elif is_now is None or was is None:
            if is_now is not was:
                yield f"{_called(name)} was {was} and is {is_now}", is_now is None
        elif abs(is_now - was) > (_RATIO_ALLOWANCE if name.endswith(("ratio", "share")) else 0):
            falls_behind = is_now < was if name in ("occupancy", "wide_share") else is_now > was
            yield f"{_called(name)} {'rose' if is_now > was else 'fell'} from {was} to {is_now}", falls_behind


def _called(name: str) -> str:
    names = {"byte_ratio": "bytes issued ÷ compulsory", "flop_ratio": "FLOPs issued ÷ required"}
    names["wide_share"] = "share of 128-bit accesses"
    return names.get(name, name)


def accept(audit: Audit, directory: Path, why: str) -> Path:
    """Make the audit the one that others are compared with; the figures of ops and chips that it left out stay.

    Args:
        audit: of the triton version whose baseline is written.
        directory: where baselines lie.
        why: the reason, for the change log beside them.

    Raises:
        TrainingError: there is no reason, or there are launches that cannot be compiled or run.
    """
    if not why.strip():
        raise TrainingError("an audit is accepted for a reason, which the change log keeps: add --why 'the reason'")
    if audit["errors"]:
        raise TrainingError("an audit with errors cannot be accepted; mend the launches that it names first")
    path = path_for(directory, audit)
    kept = read(path) if path.is_file() else {}
    figures = {p: f for p, f in kept.items() if p.op not in audit["ops"] or p.chip not in audit["chips"]}
    change = compare(audit, kept)
    figures |= figures_of(audit)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(_written(figures, audit["environment"]["triton"]), encoding="utf-8")
    _log(directory / _CHANGELOG, path.stem, why.strip(), change)
    return path


def _written(figures: Mapping[Place, Figures], triton: str) -> str:
    """A line for each kernel and its figures, so that a difference reads well."""
    lines: dict[str, list[str]] = {}
    for place, found in figures.items():
        line = {"op": place.op, "chip": place.chip, "pass": place.part, "kernel": place.kernel, "figures": found}
        lines.setdefault(json.dumps(line, ensure_ascii=False), []).append(place.sample)
    merged = [
        json.dumps({**json.loads(line), "samples": samples}, ensure_ascii=False) for line, samples in lines.items()
    ]
    return f'{{"format": 1, "triton": "{triton}", "lines": [\n' + ",\n".join(sorted(merged)) + "\n]}\n"


def _log(path: Path, name: str, why: str, change: Comparison) -> None:
    """Put the newest entry first."""
    entries = path.read_text(encoding="utf-8").removeprefix(_CHANGELOG_HEAD) if path.is_file() else ""
    counts = f"{len(change.worse)} worse, {len(change.better)} better, {len(change.new)} new"
    today = datetime.date.today().isoformat()
    path.write_text(f"{_CHANGELOG_HEAD}\n## {today}, {name}\n\n{why} ({counts})\n{entries}", encoding="utf-8")
