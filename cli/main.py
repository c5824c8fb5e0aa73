"""The ``tilewright`` command: finds the subcommand; what a user can mend becomes one sentence and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence

from tilewright.cli import audit, benchmark, corpus, doctor, evaluate, generate, replay, train, watch
from tilewright.corpus import CorpusError
from tilewright.trainer.errors import AnotherProcessEnded, TrainingError, disk_error_text, tell_launcher

_EPILOG = """\
a first run:
  tilewright corpus build --source stdlib --output data/stdlib
  tilewright train quickstart

on many processes or GPUs:
  torchrun --nproc-per-node 8 -m tilewright.cli train RECIPE
"""
# What torchrun has to see the process that died before those that end for it: it takes the first it sees as the cause.
_FIRST_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, or 2 for what the user can mend."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (TrainingError, CorpusError) as error:
        return _failed(error, str(error))
    except OSError as error:
        return _failed(error, disk_error_text(error))
    except KeyboardInterrupt:
        print(f"{_rank()}tilewright: interrupted; the same command starts again from what is complete", file=sys.stderr)
        return 130
    except Exception:
        tell_launcher(traceback.format_exc())
        raise


def _failed(error: Exception, text: str) -> int:
    """Say why, to the user and to a launcher."""
    print(f"{_rank()}tilewright: {text}", file=sys.stderr, flush=True)
    if isinstance(error, AnotherProcessEnded) and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_FIRST_SECONDS)
    tell_launcher(text)
    return 2


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
