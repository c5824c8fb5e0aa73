"""``tilewright benchmark report``: one HTML page, of a record beside an earlier one if given, or of an attribution."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.clone import load_benchmarks
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    from tilewright.benchmarks.report.records import Record


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``tilewright benchmark``."""
    parser = subparsers.add_parser(
        "report",
        help="write a page of what was measured, beside an earlier record if given",
        description="Write one self-contained HTML page of a benchmark record: plots over shape, tables, ratios with "
        "their intervals, environment, and what was predicted and what measured. Given what `tilewright benchmark "
        "attribute --json` wrote, show what each kernel buys in a training step.",
    )
    parser.add_argument(
        "new", type=Path, metavar="NEW.json", help="what `tilewright benchmark run`, or `attribute --json`, wrote"
    )
    parser.add_argument("base", type=Path, nargs="?", metavar="BASE.json", help="an earlier record to compare with")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--fail-above",
        type=_share,
        metavar="PERCENT",
        help="exit with status 1 if time or peak memory of ours is worse than BASE by more than this (such as 10%%), "
        "whatever in the ratio's interval is true",
    )
    parser.add_argument(
        "--audit", type=Path, metavar="AUDIT.json", help="what `tilewright audit --json` wrote, for its predicted times"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; 1 if something is worse than ``--fail-above`` allows."""
    load_benchmarks()
    from tilewright.benchmarks.attribution import is_record
    from tilewright.benchmarks.report import benchmark_page, records

    content = records.read_json(arguments.new, records.MEND)
    if is_record(content):
        return _attribution(arguments, content)
    if arguments.fail_above is not None and arguments.base is None:
        raise TrainingError("--fail-above compares with an earlier record: name it after the new one")
    new = records.parsed(content, arguments.new)
    base = records.read(arguments.base) if arguments.base is not None else None
    audit = _audit(arguments.audit) if arguments.audit is not None else None
    benchmark_page.write(arguments.output, new, base, audit)
    print(f"report: {arguments.output}")
    if base is None:
        return 0
    if (different := benchmark_page.difference_of_devices(new, base)) is not None:
        print(f"WARNING: {different}")
    return _compare(new, base, arguments.fail_above)


def _attribution(arguments: argparse.Namespace, content: Mapping[str, Any]) -> int:
    from tilewright.benchmarks.attribution import recorded
    from tilewright.benchmarks.report import attribution_page

    if arguments.base is not None or arguments.fail_above is not None or arguments.audit is not None:
        raise TrainingError(
            f"{arguments.new} is an attribution, which is compared with nothing: give it without BASE.json, "
            "--fail-above and --audit"
        )
    attribution_page.write(arguments.output, recorded(content, arguments.new))
    print(f"report: {arguments.output}")
    return 0


def _compare(new: Record, base: Record, above: float | None) -> int:
    from tilewright.benchmarks.report.ratios import changes, gone, lost

    found = [change for change in changes(new, base) if change.new.is_ours]
    if above is None:
        return 0
    if not found:
        raise TrainingError(
            f"{new.path} and {base.path} have no row of ours in common, so nothing was compared; "
            "give two records of the same suite"
        )
    worse = [(change.new, verdicts) for change in found if (verdicts := change.worse(above))]
    for row, verdicts in worse:
        print(f"worse: {row.case}, {row.provider}: {'; '.join(verdicts)}")
    refused = [absence for absence in lost(new, base) if absence.provider.startswith("ours")]
    for absence in refused:
        print(f"worse: {' '.join(absence[:3])}, {absence.provider}: has no time any more: {absence.reason}")
    missing = [row for row in gone(new, base) if row.is_ours]
    same = new.asked is not None and new.asked == base.asked
    for row in missing if same else ():
        print(f"worse: {row.case}, {row.provider}: is gone, though both records are of the same suite")
    if missing and not same:
        print(f"not compared: {len(missing)} rows of ours in {base.path.name} that {new.path.name} lacks")
    print(f"{len(worse)} of {len(found)} rows of ours are worse than in {base.path.name} by more than {above:.2%}")
    return 1 if worse or refused or (missing and same) else 0


def _share(text: str) -> float:
    """10% as 0.1."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not text.endswith("%") or not 0 <= percent < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; give one such as 10%")
    return percent / 100


def _audit(path: Path) -> dict[str, Any]:
    mend = "give a file that `tilewright audit --json` wrote"
    from tilewright.benchmarks.report.records import read_json

    content = read_json(path, mend)
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("floors"), list):
        raise TrainingError(f"{path} holds no audit of a format known here; {mend}")
    return content
