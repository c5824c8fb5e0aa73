"""The ``tilewright`` command: finds the subcommand; what a user can mend becomes one sentence and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tilewright.cli import audit, benchmark, corpus, doctor, evaluate, generate, replay, train, watch
from tilewright.corpus import CorpusError
from tilewright.trainer.errors import TrainingError, disk_error_text

_EPILOG = """\
a first run:
  tilewright corpus build --source stdlib --output data/stdlib
  tilewright train quickstart

on many processes or GPUs:
  torchrun --nproc-per-node 8 -m tilewright.cli train RECIPE
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, or 2 for what the user can mend."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (TrainingError, CorpusError) as error:
        print(f"{_rank()}tilewright: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{_rank()}tilewright: {disk_error_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_rank()}tilewright: interrupted; the same command starts again from what is complete", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tilewright",
        description="Train Transformers from kernels up: prepare text, train, evaluate, sample.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (doctor, corpus, train, evaluate, generate, watch, replay, audit, benchmark):
        command.add_parser(subparsers)
    return parser


def _rank() -> str:
    """Which process speaks, where there are several and it is not the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "
