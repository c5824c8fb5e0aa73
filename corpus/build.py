"""Builds a corpus in three stages, each redone only when what it depends on changed.

    documents/  train.jsonl, heldout.jsonl                  one document a line
    tokenizer/  tokenizer.json                              learned from train.jsonl
    shards/     train/00000.ds ..., heldout/00000.ds ...    the tokens of both

Every stage has a `manifest.json` that says what it was made from and what came out; `corpus/stage.py` sees to it that a
stage is there whole or not at all. Nothing depends on the clock, on where folders lie or on the order in which a
directory lists its files: equal source and settings give equal bytes.
"""

import errno
import os
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from tilewright.corpus.documents import HELD_OUT, TRAIN, document_texts, write_documents
from tilewright.corpus.errors import CorpusError
from tilewright.corpus.heldout import LARGEST_SHARE, MAX_OVERLAP, SHINGLE_WORDS
from tilewright.corpus.shards import ShardWriter, write_split_manifest
from tilewright.corpus.sources import Listing, Source, list_documents, open_source
from tilewright.corpus.stage import ensure_stage, key_of, only_builder
from tilewright.corpus.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train_tokenizer

# Part of every key: raise it when equal source and settings would come out as other files than before.
FORMAT_VERSION = 1

TOKENS_PER_SHARD = 1 << 27

T = TypeVar("T")


def build_corpus(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    suffixes: Collection[str] = (),
    vocab_size: int = 8192,
    tokenizer: str | os.PathLike[str] | None = None,
    held_out_fraction: float = 0.03,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Make `output` hold the corpus of `source`: its documents, a tokenizer, and their token shards.

    Args:
        source: "stdlib", a folder of text files, or a `.jsonl` file.
        output: the folder to build in; what of it is current already is not touched.
        suffixes: the endings of the files that count, for a folder; none given means .txt and .md.
        vocab_size: of the tokenizer trained on the documents; at least 257, the 256 bytes and end-of-text.
        tokenizer: a `tokenizer.json` to take instead, that of another corpus to mix this one with, say.
        held_out_fraction: of the bytes, between 0 and 1, to keep out of train as whole documents.
        seed: orders the train documents.
        console: where the log goes; standard output by default.

    Raises:
        CorpusError: for a source, a setting or a folder that cannot work, a full disk, another build in `output`.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"The vocabulary size is {vocab_size}; give at least {SMALLEST_VOCABULARY}, the 256 bytes and end-of-text."
        )
    if not 0 < held_out_fraction < 1:
        raise CorpusError(f"The held-out fraction is {held_out_fraction}; give one between 0 and 1, such as 0.03.")
    folder = Path(output)
    opened = open_source(source, suffixes=suffixes)
    given = None if tokenizer is None else Tokenizer.load(tokenizer)
    listing = list_documents(opened)
    log = console or Console()
    try:
        with only_builder(folder):
            documents = _documents(opened, listing, folder, held_out_fraction=held_out_fraction, seed=seed, log=log)
            known = _tokenizer(documents, folder, vocab_size=vocab_size, given=given, log=log)
            _shards(documents, known, folder, log=log)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorpusError(
                f"No space left for the corpus in {folder}; free some, or give another output folder. The stages that "
                "were finished stay."
            ) from error
        raise CorpusError(f"Cannot build in {folder} ({error}); mend that, or give another output folder.") from error


def _documents(
    source: Source, listing: Listing, output: Path, *, held_out_fraction: float, seed: int, log: Console
) -> dict[str, Any]:
    key = key_of(
        version=FORMAT_VERSION,
        documents=[(document.name, document.sha256) for document in listing.documents],
        dropped=[listing.duplicates, listing.empty, listing.not_utf8],
        held_out_fraction=held_out_fraction,
        held_out_rules=[SHINGLE_WORDS, MAX_OVERLAP, LARGEST_SHARE],
        seed=seed,
    )
    write = partial(
        write_documents,
        source,
        listing,
        held_out_fraction=held_out_fraction,
        seed=seed,
        progress=partial(_tracked, doing="comparing with held-out text", total=None, log=log),
    )
    facts, current = ensure_stage(output / "documents", key, write)
    train, held_out = facts["train"], facts["heldout"]
    _say(
        log,
        f"source: {source.description}; {len(listing.documents):,} documents, {decimal(listing.byte_count)}, after "
        f"dropping {listing.duplicates} duplicates, {listing.empty} empty and {listing.not_utf8} not in UTF-8",
    )
    _say(
        log,
        f"documents{_up_to_date(current)}: {held_out['document_count']:,} held out "
        f"({decimal(held_out['byte_count'])}); {len(facts['left_out']):,} left out of train for sharing more than "
        f"{MAX_OVERLAP:.0%} of their {SHINGLE_WORDS}-word shingles with held-out text; "
        f"{train['document_count']:,} in train ({decimal(train['byte_count'])})",
    )
    return facts


def _tokenizer(
    documents: dict[str, Any], output: Path, *, vocab_size: int, given: Tokenizer | None, log: Console
) -> Tokenizer:
    vocab_size = given.vocab_size if given else vocab_size
    key = key_of(
        version=FORMAT_VERSION,
        train=documents["train"]["sha256"],
        heldout=documents["heldout"]["sha256"],
        vocab_size=vocab_size,
        library=tokenizers.__version__,
        **({"given": given.fingerprint} if given else {}),
    )

    def train(folder: Path) -> dict[str, Any]:
        texts = document_texts(output / "documents" / TRAIN)
        total = documents["train"]["document_count"]
        serialised = (
            given.serialised
            if given
            else train_tokenizer(_tracked(texts, "training the tokenizer", total, log), vocab_size=vocab_size)
        )
        (folder / "tokenizer.json").write_bytes(serialised)
        tokenizer = Tokenizer(serialised)
        held_out_tokens = sum(map(len, tokenizer.encode_documents(document_texts(output / "documents" / HELD_OUT))))
        return {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "requested_vocab_size": vocab_size,
            "held_out_bytes_per_token": documents["heldout"]["byte_count"] / held_out_tokens,
            "library": f"tokenizers {tokenizers.__version__}",
        }

    facts, current = ensure_stage(output / "tokenizer", key, train)
    fewer = "" if facts["vocab_size"] == vocab_size else f" ({vocab_size:,} asked for, but no more pairs repeat)"
    _say(
        log,
        f"tokenizer{_up_to_date(current)}: vocabulary {facts['vocab_size']:,}{fewer}, "
        f"{facts['held_out_bytes_per_token']:.2f} bytes per token on held-out text",
    )
    return Tokenizer.load(output / "tokenizer" / "tokenizer.json")


def _shards(documents: dict[str, Any], tokenizer: Tokenizer, output: Path, *, log: Console) -> None:
    splits = {"train": TRAIN, "heldout": HELD_OUT}
    key = key_of(
        version=FORMAT_VERSION,
        documents=[documents[split]["sha256"] for split in splits],
        tokenizer=tokenizer.fingerprint,
        library=tokenizers.__version__,
        tokens_per_shard=TOKENS_PER_SHARD,
    )

    def write(folder: Path) -> dict[str, Any]:
        return {
            split: _write_split(folder / split, output / "documents" / file, documents[split], tokenizer, log)
            for split, file in splits.items()
        }

    facts, current = ensure_stage(output / "shards", key, write)
    train, held_out = facts["train"], facts["heldout"]
    _say(
        log,
        f"shards{_up_to_date(current)}: {train['token_count']:,} tokens in train, {held_out['token_count']:,} held out "
        f"({train['shard_count'] + held_out['shard_count']} shards)",
    )


def _write_split(
    folder: Path, file: Path, documents: dict[str, Any], tokenizer: Tokenizer, log: Console
) -> dict[str, Any]:
    folder.mkdir()
    texts = _tracked(document_texts(file), f"writing {folder.name} shards", documents["document_count"], log)
    with ShardWriter(
        folder,
        tokenizer_name=f"tilewright-{tokenizer.fingerprint[:12]}",
        vocab_size=tokenizer.vocab_size,
        tokens_per_shard=TOKENS_PER_SHARD,
    ) as writer:
        for tokens in tokenizer.encode_documents(texts):
            writer.write([*tokens, tokenizer.end_of_text])
    write_split_manifest(
        folder,
        writer.shards,
        byte_count=documents["byte_count"],
        end_of_text=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return {"token_count": sum(shard.token_count for shard in writer.shards), "shard_count": len(writer.shards)}


def _tracked(things: Iterable[T], doing: str, total: int | None, log: Console) -> Iterable[T]:
    """`things` behind a progress bar on a terminal; elsewhere, where a bar would be a litter of lines, as they are."""
    if not log.is_terminal:
        return things
    return track(things, doing, total=total, console=log, transient=True)


def _up_to_date(current: bool) -> str:
    return " (up to date)" if current else ""


def _say(log: Console, line: str) -> None:
    log.print(line, markup=False, highlight=False, soft_wrap=True)
