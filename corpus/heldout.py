"""Held-out text: whole documents, and the overlap that keeps their near copies out of train.

Which documents are held out follows from their names alone, so that it stays the same from seed to seed and hardly
moves when a source gains or loses a few documents.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence, Set

from tilewright.corpus.sources import ListedDocument

SHINGLE_WORDS = 8
MAX_OVERLAP = 0.10
LARGEST_SHARE = 0.25

_WORD = re.compile(r"\w+")


def choose_held_out(documents: Sequence[ListedDocument], fraction: float) -> frozenset[str]:
    """The names to hold out: in the order of the SHA-256 of their names, until `fraction` of all bytes is reached.

    Documents larger than a quarter of the held-out text are passed over, so that no single one decides what is measured
    on it; unless most of the text is in such documents, for then the others would not stand for it.
    """
    total = sum(document.byte_count for document in documents)
    wanted = fraction * total
    small = [document for document in documents if document.byte_count <= wanted * LARGEST_SHARE]
    if sum(document.byte_count for document in small) >= total / 2:
        documents = small
    held_out: set[str] = set()
    held_out_bytes = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if held_out_bytes >= wanted:
            break
        held_out.add(document.name)
        held_out_bytes += document.byte_count
    return frozenset(held_out)


def shingles(text: str) -> frozenset[bytes]:
    r"""The distinct runs of 8 consecutive words (`\w+`) of `text`, each as an 8-byte hash.

    A text of fewer than 8 words has one shingle, all of its words; a text without a word has none.
    """
    words = _WORD.findall(text)
    if not words:
        return frozenset()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    # Hashes keep the held-out set small; at 64 bits a chance collision among even 10^8 shingles moves no overlap.
    return frozenset(
        hashlib.blake2b(" ".join(words[start : start + SHINGLE_WORDS]).encode(), digest_size=8).digest()
        for start in starts
    )


def held_out_shingles(texts: Iterable[str]) -> frozenset[bytes]:
    """All shingles of the held-out texts together."""
    return frozenset().union(*map(shingles, texts))


def overlap(text: str, held_out: Set[bytes]) -> float:
    """The part of the distinct shingles of `text`, 0 to 1, that also stands in held-out text; 0 without a word."""
    own = shingles(text)
    return len(own & held_out) / len(own) if own else 0.0
