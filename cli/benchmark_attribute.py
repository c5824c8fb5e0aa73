"""``tilewright benchmark attribute``: what each kernel buys in a whole training step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.clone import load_benchmarks
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console

_EPILOG = """\
examples:
  tilewright benchmark attribute quickstart
  tilewright benchmark attribute my-recipe.yaml --steps 15 --json attribution.json
  tilewright benchmark report attribution.json      the same as a page
  torchrun --nproc-per-node 8 -m tilewright.cli benchmark attribute my-recipe.yaml

The recipe's corpus gives the tokens; where it has not been built, they are random.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "attribute",
        help="what each kernel buys in a whole training step",
        description="Take a recipe's training step with each kernel in turn replaced by plain PyTorch, and report what "
        "each one buys in time and in peak memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe that ships, such as quickstart")
    parser.add_argument(
        "--steps", type=int, default=11, metavar="N", help="steps timed of each variant, at least 6 (11)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    load_benchmarks()
    from tilewright.benchmarks.attribution import attribute, check_rounds, record, table
    from tilewright.benchmarks.training.workload import Workload
    from tilewright.trainer.parallel.sharding import world
    from tilewright.trainer.recipe.file import load_recipe
    from tilewright.trainer.run_directory import write_atomically

    check_rounds(arguments.steps)
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise TrainingError(f"--json is {arguments.json}, whose folder does not exist; make it first")
    recipe = load_recipe(arguments.recipe)
    console = Console(highlight=False, markup=False)
    with world() as processes:
        console.quiet = not processes.first
        with _shown(console) as progress:
            result = attribute(Workload.of(recipe, processes), arguments.steps, progress)
        if processes.first and arguments.json is not None:
            write_atomically(arguments.json, json.dumps(record(result, recipe, processes.device), indent=1))
        console.print(table(result, recipe, processes))
    return 0


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Shows what is going on: one line that changes on a terminal, elsewhere a line the first time."""
    if console.is_terminal:
        with console.status("building the model") as status:
            yield lambda what, done: status.update(f"{done:4.0%}  {what}")
        return
    said: set[str] = set()

    def say(what: str, done: float) -> None:
        if what not in said:
            said.add(what)
            console.print(f"{done:4.0%}  {what}", soft_wrap=True)

    yield say
