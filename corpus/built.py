"""A built corpus, opened: its tokenizer and its two splits, known to belong together."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.shards import Split
from tilewright.corpus.stage import read_stage
from tilewright.corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` made.

    Attributes:
        tokenizer: the one that made the shards.
        train, heldout: the token streams.
        documents: what the documents stage recorded: "source", "dropped", "left_out", "train", "heldout".
    """

    tokenizer: Tokenizer
    train: Split
    heldout: Split
    documents: dict[str, Any]


def open_corpus(folder: str | os.PathLike[str]) -> Corpus:
    """Open what `build_corpus` made in `folder`.

    Raises:
        CorpusError: where a stage is missing or damaged, or the shards were made with another tokenizer.
    """
    root = Path(folder)
    mend = f"build it with `tilewright corpus build --output {root}`."
    stages = {name: read_stage(root / name) for name in ("documents", "tokenizer", "shards")}
    missing = [name for name, stage in stages.items() if stage is None]
    if missing:
        raise CorpusError(f"The corpus in {root} is not whole ({', '.join(missing)} missing or damaged); {mend}")
    tokenizer = Tokenizer.load(root / "tokenizer" / "tokenizer.json")
    train, heldout = Split(root / "shards" / "train"), Split(root / "shards" / "heldout")
    for split in (train, heldout):
        if split.tokenizer_fingerprint != tokenizer.fingerprint:
            raise CorpusError(
                f"The shards in {split.folder} were made with another tokenizer than the one beside; {mend}"
            )
    documents = stages["documents"]
    assert documents is not None
    return Corpus(tokenizer, train, heldout, documents["facts"])
