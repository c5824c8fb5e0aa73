"""``tilewright generate``: continue a prompt with a run's newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EPILOG = """\
example:
  tilewright generate runs/quickstart-001 --prompt 'def read_lines(path):' --max-new-tokens 200
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Print the prompt and its continuation by the run's newest checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run directory, such as runs/quickstart-001")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=120, help="how many tokens at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="draw among the likeliest so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--averaged", action="store_true", help="with the average of the weights, where one was kept")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tilewright.trainer.trained import continue_prompt

    text = continue_prompt(
        arguments.run_directory,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        averaged=arguments.averaged,
    )
    print(arguments.prompt + text)
    return 0
