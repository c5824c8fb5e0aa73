"""The tokenizer: byte-level BPE, trained with Hugging Face `tokenizers` and kept in its `tokenizer.json`.

Text is split by GPT-2's regular expression, every byte of its UTF-8 is a symbol, and frequent neighbours are merged
(Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Radford et al. 2019 for bytes). Nothing is normalised and
nothing is unknown: decoding gives back exactly the text that was encoded, and the bytes that the tokens of a text stand
for add up to its UTF-8 length. `tokenizers` breaks ties between equally frequent pairs by their ids, so equal text
gives an equal tokenizer.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tilewright.corpus.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end-of-text token

_ENCODING_BATCH_CHARACTERS = 1 << 20


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: the ids are 0 .. vocab_size - 1.
        end_of_text: the id that closes every document; 0 in a tokenizer trained here.
        serialised: the bytes of its `tokenizer.json`.
        fingerprint: SHA-256 (hex) of those bytes; shards record the one they were made with.
        byte_lengths: int32, (vocab_size,): the UTF-8 bytes that each token stands for; 0 for special tokens.
    """

    vocab_size: int
    end_of_text: int
    serialised: bytes
    fingerprint: str
    byte_lengths: npt.NDArray[np.int32]

    def __init__(self, serialised: bytes, *, end_of_text: str = END_OF_TEXT) -> None:
        """From the bytes of a `tokenizer.json`; `ValueError` where they are no byte-level tokenizer that ends texts."""
        try:
            inner = tokenizers.Tokenizer.from_str(serialised.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises plain Exception
            raise ValueError(f"it is not a tokenizer.json ({error})") from error
        # Text that happens to spell out <|endoftext|> is text; only we end documents. tokenizer.json cannot say so.
        inner.encode_special_tokens = True
        end_id = inner.token_to_id(end_of_text)
        if end_id is None:
            raise ValueError(f"it has no {end_of_text} token")
        self._inner = inner
        self.end_of_text = end_id
        self.serialised = serialised
        self.fingerprint = hashlib.sha256(serialised).hexdigest()
        self.byte_lengths = _byte_lengths(inner)
        self.vocab_size = len(self.byte_lengths)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, end_of_text: str = END_OF_TEXT) -> "Tokenizer":
        """The tokenizer of a `tokenizer.json` file, whose token `end_of_text` closes documents.

        Raises:
            CorpusError: where the file is missing, unreadable, or not a byte-level tokenizer with an end-of-text token.
        """
        mend = "build the corpus again with `tilewright corpus build`, or put the right file there."
        try:
            return cls(Path(path).read_bytes(), end_of_text=end_of_text)
        except OSError as error:
            raise CorpusError(f"Cannot read the tokenizer {path} ({error.strerror}); {mend}") from error
        except ValueError as error:
            raise CorpusError(f"Cannot use the tokenizer {path}: {error}; {mend}") from error

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without an end-of-text token."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """`encode` of each text in order, many at a time on all cores, with a bounded number in memory."""
        for batch in _batches(texts, _ENCODING_BATCH_CHARACTERS):
            for encoding in self._inner.encode_batch(batch, add_special_tokens=False):
                yield list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, end-of-text tokens spelled out; bytes that do not form UTF-8 show as U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Learn the merges from `texts`; returns the bytes of the `tokenizer.json`.

    The vocabulary is <|endoftext|> (id 0), the 256 bytes, then merges of pairs that occur at least twice; it is smaller
    than `vocab_size` only where the text runs out of such pairs.

    Raises:
        CorpusError: where `vocab_size` leaves no room for every byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"A vocabulary of {vocab_size} cannot hold the 256 bytes and {END_OF_TEXT}; "
            f"give a vocabulary size of at least {SMALLEST_VOCABULARY}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return str(inner.to_str(pretty=True)).encode("utf-8")


def _byte_lengths(inner: Any) -> npt.NDArray[np.int32]:
    added = {token.content: token.special for token in inner.get_added_tokens_decoder().values()}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, token_id in vocabulary.items():
        if token in added:
            # Stands in the vocabulary as it stands in text, such as a run of spaces.
            lengths[token_id] = 0 if added[token] else len(token.encode("utf-8"))
            continue
        if not alphabet.issuperset(token):
            raise ValueError(f"its token {token_id}, {token!r}, is not written in bytes, so it is not byte-level")
        # In a byte-level vocabulary one character is written for each byte.
        lengths[token_id] = len(token)
    return lengths


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
