"""``tilewright evaluate``: score the held-out text of a run's corpus with its newest checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score held-out text with a trained model",
        description="Score all held-out text of the run's corpus with its newest checkpoint: loss in nats a token, "
        "perplexity, and bits per byte, which compares across tokenizers.",
        epilog="example:\n  tilewright evaluate runs/quickstart-001",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run directory, such as runs/quickstart-001")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line to read")
    parser.add_argument("--averaged", action="store_true", help="with the average of the weights, where one was kept")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tilewright.trainer.trained import evaluate_run

    step, results = evaluate_run(arguments.run_directory, averaged=arguments.averaged)
    if os.environ.get("RANK", "0") != "0":
        return 0  # all processes of torchrun have the same results, and the first one tells them
    if arguments.json:
        print(json.dumps({"step": step, "eval": results}))
        return 0
    for name, result in results.items():
        of = "" if name == "heldout" else f" of {name}"
        print(
            f"step {step}: {result['bits_per_byte']:.4f} bits per byte, loss {result['loss']:.4f} nats a token, "
            f"perplexity {result['perplexity']:.2f}, over {int(result['tokens']):,} held-out tokens{of}"
        )
    return 0
