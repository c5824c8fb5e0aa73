"""``tilewright train``: train by a recipe."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """\
examples:
  tilewright train quickstart
  tilewright train quickstart --seed 1 --optimizer.learning_rate 2e-3
  torchrun --nproc-per-node 8 -m tilewright.cli train my-recipe.yaml
  tilewright train --dry-run --as-if 256xH100 my-recipe.yaml

Ctrl-C writes a checkpoint and stops; the same command goes on from it. Each run has a directory of its own in runs/
with its resolved recipe, metrics.jsonl, TensorBoard events, checkpoints and report.html.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model by a recipe",
        description="Train a model by a recipe, from the beginning or on from the run's last checkpoint.",
        parents=[_plan_options()],
        usage="tilewright train [-h] [--dry-run --as-if NxGPU] RECIPE [--KEY VALUE ...]",
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


def _plan_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--dry-run",
        action="store_true",
        help="with --as-if: predict memory and collectives of the run on those GPUs, and run nothing",
    )
    options.add_argument("--as-if", metavar="NxGPU", help="how many GPUs of which kind, such as 256xH100")
    return options


def _run(arguments: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(arguments.overrides):
        print(arguments.help_text)
        return 0
    # Before the recipe or among its keys.
    _, arguments.overrides = _plan_options().parse_known_args(arguments.overrides, arguments)
    given = [option for option in ("dry_run", "as_if") if hasattr(arguments, option)]
    if given:
        return _dry_run(arguments, given)
    from tilewright.trainer.host_memory import spare_triton

    spare_triton()  # before anything imports it; a plan for GPUs needs it
    from rich.console import Console

    from tilewright.trainer.loop import train
    from tilewright.trainer.recipe.file import load_recipe

    train(load_recipe(arguments.recipe, arguments.overrides), Console())
    return 0


def _dry_run(arguments: argparse.Namespace, given: list[str]) -> int:
    from tilewright.trainer.errors import TrainingError
    from tilewright.trainer.plan.dry_run import check_fits, plan, plan_text
    from tilewright.trainer.recipe.file import load_recipe

    if len(given) == 1:
        raise TrainingError("--dry-run and --as-if go together, as in --dry-run --as-if 256xH100; give both or neither")
    predicted = plan(load_recipe(arguments.recipe, arguments.overrides), arguments.as_if)
    print(plan_text(predicted), flush=True)
    check_fits(predicted)
    return 0
