"""``tilewright train``: train by a recipe."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """\
examples:
  tilewright train quickstart
  tilewright train quickstart --seed 1 --optimizer.learning_rate 2e-3
  torchrun --nproc-per-node 8 -m tilewright.cli train my-recipe.yaml

Ctrl-C writes a checkpoint and stops; the same command goes on from it. Each run has a directory of its own in runs/
with its resolved recipe, metrics.jsonl, TensorBoard events, checkpoints and report.html.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model by a recipe",
        description="Train a model by a recipe, from the beginning or on from the run's last checkpoint.",
        usage="tilewright train [-h] RECIPE [--KEY VALUE ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe that ships, such as quickstart")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--KEY VALUE",
        help="after the recipe, any key of the recipe in dotted form with another value, such as --batch.micro_batch 4",
    )
    parser.set_defaults(run=_run, help_text=parser.format_help())


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tilewright.trainer.loop import train
    from tilewright.trainer.recipe import load_recipe

    if {"-h", "--help"} & set(arguments.overrides):
        print(arguments.help_text)
        return 0
    train(load_recipe(arguments.recipe, arguments.overrides), Console())
    return 0
