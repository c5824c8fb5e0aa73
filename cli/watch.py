"""``tilewright watch``: follow a run from another terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "watch",
        help="follow a run from another terminal",
        description="Show a run as its own terminal shows it, while it goes on, until it has finished. Ctrl-C ends the "
        "watching and not the run.",
        epilog="example:\n  tilewright watch runs/quickstart-001",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run directory, such as runs/quickstart-001")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tilewright.trainer.record.display import Display
    from tilewright.trainer.record.watch import watch

    with Display(Console()) as display:
        try:
            watch(arguments.run_directory, display)
        except KeyboardInterrupt:
            display.message("no longer watching; the run goes on")
    return 0
