"""From text to batches: text → documents → tokenizer → token shards → one stream → batches.

`build_corpus` does the first part once and keeps it in a folder: it lists the documents of a source, holds some out and
leaves their near copies out of train, trains a byte-level BPE tokenizer, and writes token shards in datatrove's layout.
`open_corpus` opens that folder, and `open_shards` one that datatrove wrote. `TrainStream` and `HeldOutStream` turn a
split into batches: the first endless and shuffled, each sample a pure function of the seed and its index, the second in
order, every token predicted once. `MixtureStream` deals the samples of several splits by their weights, and `Prefetch`
reads batches ahead.
"""

from tilewright.corpus.build import build_corpus
from tilewright.corpus.built import Corpus, holds_shards, open_corpus, open_shards
from tilewright.corpus.errors import CorpusError
from tilewright.corpus.mixture import MixtureStream, whole_shares
from tilewright.corpus.permutation import Permutation
from tilewright.corpus.prefetch import Prefetch
from tilewright.corpus.shards import ShardWriter, write_split_manifest
from tilewright.corpus.split import Split
from tilewright.corpus.stream import IGNORE, Batch, HeldOutStream, TrainStream
from tilewright.corpus.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "IGNORE",
    "Batch",
    "Corpus",
    "CorpusError",
    "HeldOutStream",
    "MixtureStream",
    "Permutation",
    "Prefetch",
    "ShardWriter",
    "Split",
    "Tokenizer",
    "TrainStream",
    "build_corpus",
    "holds_shards",
    "open_corpus",
    "open_shards",
    "train_tokenizer",
    "whole_shares",
    "write_split_manifest",
]
