"""`tilewright corpus build` and `tilewright corpus show`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from tilewright.corpus import build_corpus, open_corpus

_BUILD_EXAMPLES = """\
examples:
  tilewright corpus build --output data/stdlib
  tilewright corpus build --source notes/ --suffix .txt --suffix .md --output data/notes
  tilewright corpus build --source pages.jsonl --vocab-size 32000 --output data/pages
  tilewright corpus build --source new/ --tokenizer data/pages/tokenizer/tokenizer.json --output data/new

A second run builds again only what changed. Ctrl-C leaves what was there before."""

_SHOW_EXAMPLES = """\
example:
  tilewright corpus show data/stdlib"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `corpus`; the parsed arguments carry `run`, which does it and returns the exit status."""
    corpus = subparsers.add_parser(
        "corpus",
        help="turn text into a tokenizer and token shards, and look at them",
        description="Turn text into a tokenizer and token shards, and look at what was built.",
    )
    commands = corpus.add_subparsers(title="commands", dest="corpus_command", metavar="COMMAND", required=True)

    build = commands.add_parser(
        "build",
        help="build a corpus: documents, tokenizer, token shards",
        description="Build a corpus: list the documents of a source and hold some out,\ntrain a byte-level BPE "
        "tokenizer on the rest, and write token shards of both.",
        epilog=_BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "--source",
        default="stdlib",
        metavar="stdlib|DIR|FILE.jsonl",
        help="where the text is: the source code of this Python's standard library, a folder of text files, or a JSON "
        'Lines file with a string under "text" on each line (default: %(default)s)',
    )
    build.add_argument(
        "--suffix",
        action="append",
        default=[],
        metavar=".EXT",
        help="for a folder: a file name ending that counts; repeat it for several (default: .txt and .md)",
    )
    build.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to build in (required)")
    build.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="tokens in the vocabulary (default: %(default)s)"
    )
    build.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="take this tokenizer.json instead of training one, that of a corpus to mix this one with, say",
    )
    build.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.03,
        metavar="F",
        help="part of the bytes to hold out, as whole documents (default: %(default)s)",
    )
    build.add_argument(
        "--seed", type=int, default=0, metavar="N", help="orders the train documents (default: %(default)s)"
    )
    build.set_defaults(run=_build)

    show = commands.add_parser(
        "show",
        help="show what a built corpus holds",
        description="Show what a built corpus holds.",
        epilog=_SHOW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("folder", type=Path, metavar="DIR", help="the folder that the corpus was built in")
    show.set_defaults(run=_show)


def _build(arguments: argparse.Namespace) -> int:
    build_corpus(
        arguments.source,
        arguments.output,
        suffixes=arguments.suffix,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        held_out_fraction=arguments.heldout_fraction,
        seed=arguments.seed,
    )
    return 0


def _show(arguments: argparse.Namespace) -> int:
    corpus = open_corpus(arguments.folder)
    table = Table(
        "split", *(Column(name, justify="right") for name in ("documents", "text", "tokens", "bytes per token"))
    )
    for name, split in (("train", corpus.train), ("held out", corpus.heldout)):
        byte_count = split.byte_count or 0
        table.add_row(
            name,
            f"{split.document_count:,}",
            decimal(byte_count),
            f"{split.token_count:,}",
            # One end-of-text token a document stands for no byte of text.
            f"{byte_count / (split.token_count - split.document_count):.2f}",
        )
    console = Console()
    console.print(f"source: {corpus.documents['source']}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    dropped = corpus.documents["dropped"]
    console.print(
        f"vocabulary {corpus.tokenizer.vocab_size:,}; left out of train for overlap with held-out text: "
        f"{len(corpus.documents['left_out']):,}; dropped: {dropped['duplicates']} duplicates, "
        f"{dropped['empty']} empty, {dropped['not_utf8']} not in UTF-8",
        highlight=False,
        soft_wrap=True,
    )
    return 0
