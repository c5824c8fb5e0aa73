"""From text to batches: text → documents → tokenizer → token shards → one stream → batches.

`build_corpus` does the first part once and keeps it in a folder: it lists the documents of a source, holds some out and
leaves their near copies out of train, trains a byte-level BPE tokenizer, and writes token shards in datatrove's layout.
`open_corpus` opens that folder; a `Split` also opens shards that datatrove wrote. `TrainStream` and `HeldOutStream`
turn a split into batches: the first endless and shuffled, each sample a pure function of the seed and its index, the
second in order, every token predicted once.
"""

from tilewright.corpus.build import build_corpus
from tilewright.corpus.built import Corpus, open_corpus
from tilewright.corpus.errors import CorpusError
from tilewright.corpus.permutation import Permutation
from tilewright.corpus.shards import ShardWriter, Split, write_split_manifest
from tilewright.corpus.stream import IGNORE, Batch, HeldOutStream, TrainStream
from tilewright.corpus.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "IGNORE",
    "Batch",
    "Corpus",
    "CorpusError",
    "HeldOutStream",
    "Permutation",
    "ShardWriter",
    "Split",
    "Tokenizer",
    "TrainStream",
    "build_corpus",
    "open_corpus",
    "train_tokenizer",
    "write_split_manifest",
]
