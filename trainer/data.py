"""What a run reads: the corpora that its recipe names, what tells them from others, and each process's part of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.corpus import (
    Corpus,
    HeldOutStream,
    MixtureStream,
    Tokenizer,
    TrainStream,
    holds_shards,
    open_corpus,
    open_shards,
    whole_shares,
)
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.recipe import Data

if TYPE_CHECKING:
    from tilewright.trainer.checkpoints.storage import Location

CORPUS = "corpus.json"
HELDOUT = "heldout"
HELDOUT_AVERAGED = "heldout_averaged"


@dataclass(frozen=True)
class TrainingData:
    """The corpora of a run, opened.

    Attributes:
        corpora: by the name of their source; one alone has no name but ``heldout``, what its held-out text is called.
        weights: one for each of several; empty for one alone.
        tokenizer: that of all of them.
    """

    corpora: dict[str, Corpus]
    weights: Sequence[float]
    tokenizer: Tokenizer

    def train_stream(self, *, sequence_length: int, seed: int) -> TrainStream | MixtureStream:
        """The samples to train on; raises `CorpusError` where a corpus is too short for one."""
        splits = {name: corpus.train for name, corpus in self.corpora.items()}
        if not self.weights:
            return TrainStream(*splits.values(), sequence_length=sequence_length, seed=seed)
        return MixtureStream(splits, self.weights, sequence_length=sequence_length, seed=seed)

    def heldout_streams(self, *, sequence_length: int) -> dict[str, HeldOutStream]:
        """What to evaluate on, by name."""
        return {
            name: HeldOutStream(corpus.heldout, sequence_length=sequence_length)
            for name, corpus in self.corpora.items()
        }

    def identity(self) -> dict[str, object]:
        """What tells this data from other: tokenizer, texts and token counts of every source, and their weights."""
        shards = {
            name: {"train": corpus.train.fingerprint, "heldout": corpus.heldout.fingerprint}
            for name, corpus in self.corpora.items()
        }
        identity: dict[str, object] = {"tokenizer": self.tokenizer.fingerprint}
        if not self.weights:
            return identity | shards[HELDOUT]
        return identity | {"sources": shards, "shares": dict(zip(shards, whole_shares(self.weights), strict=True))}


def open_data(data: Data) -> TrainingData:
    """Open what the recipe's `data` section names.

    Raises:
        TrainingError: it names nothing, or corpora of different tokenizers.
        CorpusError: a corpus is missing or damaged.
    """
    if data.sources:
        named = {
            name: (source.corpus, source.heldout)
            for name, source in zip(data.source_names(), data.sources, strict=True)
        }
    elif data.corpus:
        named = {HELDOUT: (data.corpus, data.heldout)}
    else:
        raise TrainingError("the recipe names no data; give data.corpus, or several corpora as data.sources")
    corpora = {name: _open(corpus, heldout, data) for name, (corpus, heldout) in named.items()}
    first, *others = corpora.values()
    for other in others:
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise TrainingError(
                f"{first.folder} and {other.folder} were made with different tokenizers, and one model reads them "
                "both; build one again with the tokenizer of the other (tilewright corpus build --tokenizer)"
            )
    return TrainingData(corpora, [source.weight for source in data.sources], first.tokenizer)


def is_same_data(run: Location, data: TrainingData) -> bool:
    """Whether a run was trained on `data`, as far as it recorded that."""
    recorded = _recorded(run)
    return recorded is None or recorded == data.identity()


def check_same_data(run: Location, data: TrainingData) -> None:
    """Raise if a run, or that of the checkpoints in a folder, was trained on other data.

    Raises:
        TrainingError: it was: with other weights, or a corpus folder has been built anew from other text or with other
            settings.
    """
    if is_same_data(run, data):
        return
    recorded, now = _recorded(run) or {}, data.identity()
    if recorded.get("shares") != now.get("shares") and recorded.get("sources") == now.get("sources"):
        raise TrainingError(
            f"{run} was trained with the weights {_mixed(recorded)} and the recipe now says {_mixed(now)}; set them "
            "back, or start a new run in another run directory"
        )
    folders = " and ".join(str(corpus.folder) for corpus in data.corpora.values())
    raise TrainingError(
        f"{run} was trained on another corpus than the one that is now in {folders}; bring that one back, or start a "
        "new run in another run directory"
    )


def samples_of(first: int, sequences: int, *, rank: int, processes: int, micro_batch: int) -> Iterator[range]:
    """The samples of each micro-batch of a process, in a step whose samples are first .. first + sequences - 1.

    The processes share the step in equal parts, in the order of their ranks, so how many there are and how much each
    takes at a time decide who reads a sample, never which samples a step has.
    """
    share = sequences // processes
    mine = range(first + rank * share, first + (rank + 1) * share)
    for start in range(0, share, micro_batch):
        yield mine[start : start + micro_batch]


def _open(corpus: str, heldout: str, data: Data) -> Corpus:
    if holds_shards(corpus):
        return open_shards(corpus, tokenizer=data.tokenizer, heldout=heldout, end_of_text=data.end_of_text)
    return open_corpus(corpus)


def _recorded(run: Location) -> dict[str, object] | None:
    """What a run recorded of its data; None where it did not, empty where that cannot be read."""
    try:
        recorded = json.loads((run / CORPUS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _mixed(identity: dict[str, object]) -> str:
    shares = identity.get("shares")
    return " : ".join(f"{name} {share}" for name, share in shares.items()) if isinstance(shares, dict) else "of one"
