"""``tilewright replay``: take one step of a run again in one process, and look at it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "replay",
        help="take one step of a run again, in one process",
        description="Take one step of a run again in one process, from the newest checkpoint before it: the loss of "
        "each micro-batch, the gradient's norm by block, and what in it is not finite. The run is only read.",
        epilog="example:\n  tilewright replay runs/quickstart-001 --step 120",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run directory, such as runs/quickstart-001")
    parser.add_argument("--step", type=int, required=True, help="which one, counted from 1 as in metrics.jsonl")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tilewright.trainer.replay import replay, replayed_text

    replayed = replay(arguments.run_directory, arguments.step, lambda line: print(line, file=sys.stderr))
    print(replayed_text(replayed))
    return 0
