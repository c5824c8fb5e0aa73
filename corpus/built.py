"""A corpus, opened: its tokenizer and its two splits, known to belong together."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.split import Split
from tilewright.corpus.stage import read_stage
from tilewright.corpus.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` made, or shards that something else did.

    Attributes:
        folder: where it lies.
        tokenizer: the one that made the shards.
        train, heldout: the token streams.
        documents: what the documents stage recorded: "source", "dropped", "left_out", "train", "heldout"; empty for
            shards made elsewhere.
    """

    folder: Path
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
    return Corpus(root, tokenizer, train, heldout, documents["facts"])


def holds_shards(folder: str | os.PathLike[str]) -> bool:
    """Whether token shards lie in the folder itself, as datatrove leaves them, and not in a corpus built in it."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(".ds") for entry in entries)
    except OSError:
        return False


def open_shards(
    folder: str | os.PathLike[str], *, tokenizer: str, heldout: str, end_of_text: str = END_OF_TEXT
) -> Corpus:
    """Open token shards that datatrove wrote.

    Args:
        folder: of the shards to train on.
        tokenizer: the `tokenizer.json` that they were made with, which nothing in datatrove's layout can confirm.
        heldout: folder of the shards to evaluate on, made with the same tokenizer.
        end_of_text: the token that closes documents.

    Raises:
        CorpusError: where something is not named, missing or damaged, or the shards hold loss masks.
    """
    root = Path(folder)
    for what, path in {"tokenizer": tokenizer, "heldout": heldout}.items():
        if not path:
            raise CorpusError(
                f"{root} holds token shards and nothing else, so the recipe must name its {what} too: give the "
                "tokenizer.json that made them as data.tokenizer, and as `heldout`, beside `corpus`, a folder of "
                "other shards to evaluate on."
            )
    known = Tokenizer.load(tokenizer, end_of_text=end_of_text)
    train, held_out = (
        Split(path, end_of_text=known.end_of_text, vocab_size=known.vocab_size) for path in (root, Path(heldout))
    )
    for split in (train, held_out):
        if next(split.folder.glob("*.ds.loss"), None) is not None:
            raise CorpusError(
                f"{split.folder} holds loss masks (.ds.loss), which are not read, so that every token would be trained "
                "on; remove them if that is meant, or tokenise without save_loss_metadata."
            )
    return Corpus(root, known, train, held_out, documents={})
