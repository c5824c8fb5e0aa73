"""``tilewright benchmark``: time and memory, wherever they run; each subcommand is one file, `benchmark_NAME.py`."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

_SUBCOMMANDS = ("run", "report", "attribute", "tune")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command and its subcommands."""
    parser = subparsers.add_parser(
        "benchmark",
        help="measure time and memory, and report on them",
        description="Measure time and memory of the kernels and of training steps, and report on them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _SUBCOMMANDS:
        importlib.import_module(f"tilewright.cli.benchmark_{name}").add_parser(commands)
