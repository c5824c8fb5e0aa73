"""``tilewright audit``: what the compiler made of every kernel, and what each one issues, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.clone import BENCHMARKS, load_benchmarks
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """\
Compile every launch of every op for GPUs that are not there, at the shapes of real models, and read registers, spills,
occupancy and instructions off the code; count in Triton's interpreter what a small size of each launch reads, writes
and multiplies; and predict the least time that each could take at the GPU's datasheet peaks. Prints the bars that must
hold. Ends with status 1 where one does not, or where an accepted audit was better.
"""

_EPILOG = """\
examples:
  tilewright audit                                     every op, A100 and H100: some minutes on two cores
  tilewright audit rms_norm attention --chips 90,100   two ops, for H100 and B200
  tilewright audit --against liger-kernel              the same figures of another library's kernels beside ours
  tilewright audit --baseline benchmarks/baselines     fail where an accepted audit was better
  tilewright audit --accept --why "wider blocks"       make this the accepted audit
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "audit",
        help="say what the compiler made of every kernel and what each one issues, without a GPU",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to audit; all where none is named")
    parser.add_argument("--chips", default="80,90", help="generations: 80 (A100), 90 (H100), 100 (B200); default 80,90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with plots and tables there (HTML)")
    parser.add_argument("--against", action="append", default=[], metavar="LIBRARY", help="compare with its kernels")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="fail where the audit accepted there was better")
    parser.add_argument("--accept", action="store_true", help="make this the accepted audit")
    parser.add_argument("--why", default="", metavar="TEXT", help="the reason to accept it, for the change log")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    load_benchmarks()
    _check(arguments)
    # Heavy, and known by name only once the benchmarks are found.
    from rich.console import Console

    from tilewright.benchmarks.audit import audit as auditing
    from tilewright.benchmarks.audit import bars, baseline, table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width of its own
    audit = auditing.audit(arguments.ops, _chips(arguments.chips), console)
    alone = _compare_with_libraries(audit, arguments, console)
    verdicts = bars.verdicts(audit)
    audit["bars"] = [
        {
            "bar": verdict.bar.name,
            "bound": verdict.bar.bound,
            "met": verdict.met,
            "worst": verdict.worst.value if verdict.worst else None,
            "row": verdict.worst.row if verdict.worst else None,
        }
        for verdict in verdicts
    ]
    _write(audit, arguments)
    console.print(table.compiled_table(audit), table.traffic_table(audit))
    _list(console, "Could not be audited", table.error_lines(audit["errors"]))
    console.print(table.bars_table(verdicts))
    _list(console, "Compared with nothing", (f"{library} has no row beside ours" for library in alone))
    failed = bool(audit["errors"]) or bool(alone) or any(verdict.met is False for verdict in verdicts)
    directory = arguments.baseline or BENCHMARKS / "baselines"
    if arguments.accept:
        console.print(f"accepted: {baseline.accept(audit, directory, arguments.why)}", markup=False)
    elif arguments.baseline:
        change = baseline.compare(audit, baseline.read(baseline.path_for(directory, audit)))
        _list(console, "Better than the accepted audit (--accept keeps it so)", change.better)
        _list(console, "New, so to be accepted: --accept --why 'the reason'", change.new)
        _list(console, "Worse than the accepted audit", change.worse)
        failed = failed or bool(change.worse or change.new)
    return int(failed)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse now what would be refused after minutes."""
    if arguments.accept and not arguments.why.strip():
        raise TrainingError("an audit is accepted for a reason, which the change log keeps: add --why 'the reason'")
    if arguments.why and not arguments.accept:
        raise TrainingError("--why is the reason to accept an audit; add --accept, or leave it out")
    for file in (arguments.json, arguments.page):
        if file is not None and not file.absolute().parent.is_dir():
            raise TrainingError(f"{file}: the directory {file.absolute().parent} does not exist; make it first")
        if file is not None and file.is_dir():
            raise TrainingError(f"{file} is a directory; name a file in it")
        if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise TrainingError(f"{file} cannot be written; name a file that can, or change its permissions")
    if arguments.against:
        from tilewright.benchmarks.audit import peers

        for library in arguments.against:
            peers.version_of(library)


def _chips(text: str) -> list[int]:
    try:
        return sorted({int(chip.strip().removeprefix("sm_")) for chip in text.split(",")})
    except ValueError:
        raise TrainingError(f"--chips {text}: it must be generations with commas between, such as 80,90") from None


def _compare_with_libraries(audit: dict[str, Any], arguments: argparse.Namespace, console: Console) -> list[str]:
    """Add the comparison to the audit, list what a library's errors leave out of it, and return the libraries of which
    nothing could be compared."""
    if not arguments.against:
        return []
    from tilewright.benchmarks.audit import peers, table

    audit["comparison"], alone = [], []
    for library in arguments.against:
        theirs = peers.audit(library, arguments.ops, _chips(arguments.chips), console)
        rows = peers.compare(audit, theirs)
        audit["comparison"] += rows
        if not rows:
            alone.append(library)
        _list(
            console, f"Left out of the comparison: launches of {library} that fail", table.error_lines(theirs["errors"])
        )
    return alone


def _write(audit: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        arguments.json.write_text(json.dumps(audit, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        from tilewright.benchmarks.report import audit_page

        audit_page.write(audit, arguments.page)


def _list(console: Console, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        console.print(f"\n[bold]{title}[/]: {len(lines):,}")
    for line in lines:
        console.print(f"- {line}", markup=False, soft_wrap=True)
