"""From the stream of tokens to batches: windows of T tokens, their targets, and where attention must not cross.

The end-of-text token that closes one document opens the next. In a window, a segment therefore starts at the
end-of-text token: as an input it belongs to the document after it and predicts that document's first token, and as a
target it is predicted by the last token of its own document. Every token is a target once, in the right context, and
nothing is lost at a boundary:

    stream        a b c . d e .       the index says that documents end after both full stops (end-of-text)
    inputs        a b c . d e         T = 6
    targets       b c . d e .
    segments      0 0 0 1 1 1

Where a document does not end with end-of-text (shards made elsewhere), its last token has nothing to predict: the
target is IGNORE and the segment starts at the next document's first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.permutation import Permutation
from tilewright.corpus.split import Split

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows of T tokens each, one a row.

    Attributes:
        inputs: (samples, T), int64.
        targets: (samples, T), int64; `IGNORE` where there is nothing to predict.
        cu_seqlens: (segments + 1,), int32: where each attention segment starts in `inputs` flattened to
            (samples * T,); the first is 0, the last samples * T, strictly increasing. Every row starts a segment, and
            so does every document inside a row.
    """

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]


class TrainStream:
    """Endless shuffled samples: N tokens make (N - 1) // T windows, each epoch visits each once in an order of its own.

    A sample is a pure function of (seed, global sample index). Window w reads tokens w·T .. w·T + T, so neighbours
    share one token, which is an input of one and a target of the other. The tokens past the last full window are not
    used.

    Attributes:
        samples_per_epoch: windows in the split.
    """

    def __init__(self, split: Split, *, sequence_length: int, seed: int) -> None:
        """Raises `CorpusError` where the split is too short for one sample."""
        if sequence_length < 1:
            raise CorpusError(f"The sequence length is {sequence_length}; give at least 1.")
        if split.token_count < sequence_length + 1:
            raise CorpusError(
                f"A sequence length of {sequence_length} is longer than the shards allow: {split.folder} holds "
                f"{split.token_count} tokens and a sample takes {sequence_length + 1}; give a sequence length of at "
                f"most {split.token_count - 1}, or a larger corpus."
            )
        self.samples_per_epoch = (split.token_count - 1) // sequence_length
        self._split = split
        self._sequence_length = sequence_length
        self._seed = seed

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of those global indices, one a row; index // samples_per_epoch is a sample's epoch."""
        return batch_of([self.place(sample) for sample in samples], self._sequence_length)

    def place(self, sample: int) -> tuple[Split, int]:
        """Where a sample is read: the split, and its first token there."""
        epoch, index = divmod(int(sample), self.samples_per_epoch)
        if epoch < 0:
            raise IndexError(f"sample index is {sample}; the first is 0")
        window = Permutation(self.samples_per_epoch, seed=self._seed, epoch=epoch)(index)
        return self._split, window * self._sequence_length

    def documents(self, sample: int) -> list[str]:
        """The documents that a sample reads from, as ``FOLDER/SHARD.ds:NUMBER``, numbers counting from 0."""
        split, first = self.place(sample)
        read = split.documents(first, self._sequence_length + 1)
        return [f"{split.folder / shard}:{number}" for shard, number in read]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples go through the split; its name stands for it."""
        return {self._split.folder.name: samples / self.samples_per_epoch}


class HeldOutStream:
    """Windows in order in which every token of the split is a target exactly once.

    One end-of-text token, which the split does not hold, comes before its first token, so that this one is predicted
    too; the last window is filled up with end-of-text inputs whose targets are `IGNORE`. (A document that does not end
    with end-of-text costs the next one its first target.)
    """

    def __init__(self, split: Split, *, sequence_length: int) -> None:
        """Raises `CorpusError` where nothing says which token ends a text."""
        if sequence_length < 1:
            raise CorpusError(f"The sequence length is {sequence_length}; give at least 1.")
        if split.end_of_text is None:
            raise CorpusError(
                f"Nothing says which token ends a text in {split.folder}, which has no manifest.json; open it with "
                "Split(folder, end_of_text=ID)."
            )
        self._split = split
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-self._split.token_count // self._sequence_length)

    def batch(self, windows: Sequence[int]) -> Batch:
        """Those windows, one a row; `IndexError` for one that is not in 0 .. len(self) - 1."""
        for window in windows:
            if not 0 <= window < len(self):
                raise IndexError(f"window is {window}; there are {len(self)}")
        places = [(self._split, int(window) * self._sequence_length - 1) for window in windows]
        return batch_of(places, self._sequence_length)


def batch_of(places: Sequence[tuple[Split, int]], length: int) -> Batch:
    """The windows of `length` tokens whose first inputs stand at those places, one a row."""
    inputs = np.empty((len(places), length), dtype=np.int64)
    targets = np.empty((len(places), length), dtype=np.int64)
    starts: list[npt.NDArray[np.int64]] = []
    for row, (split, first) in enumerate(places):
        inputs[row], targets[row], row_starts = _window(split, first, length)
        starts.append(row_starts + row * length)
    ends = np.concatenate([*starts, [len(places) * length]])
    return Batch(inputs, targets, ends.astype(np.int32))


def _window(
    split: Split, first: int, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and targets, (length,) each, and the places where segments start, of the window whose first input is token
    `first` of the stream; outside the stream, before it and after it, lies end-of-text that nothing predicts.
    """
    end_of_text = -1 if split.end_of_text is None else split.end_of_text  # no token is -1, so no document ends with it
    low, high = max(first, 0), min(first + length + 1, split.token_count)
    tokens = np.full(length + 1, end_of_text, dtype=np.int64)
    tokens[low - first : high - first] = split.read(low, high - low)
    if split.vocab_size is not None and tokens.max() >= split.vocab_size:
        raise CorpusError(
            f"The shards in {split.folder} are damaged: they hold token {tokens.max()} near position {first}, and "
            f"their vocabulary ends at {split.vocab_size - 1}; build the corpus again in another folder."
        )
    inputs, targets = tokens[:-1], tokens[1:].copy()
    targets[high - first - 1 :] = IGNORE
    # Where, counted in the window, each next document begins.
    next_documents = split.document_boundaries(low, high - low) - first
    next_documents = next_documents[next_documents <= length]
    closed = tokens[next_documents - 1] == end_of_text
    targets[next_documents[~closed] - 1] = IGNORE
    starts = np.where(closed, next_documents - 1, next_documents)
    starts = np.unique(np.append(starts[starts < length], 0))
    return inputs, targets, starts
