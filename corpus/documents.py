"""The documents of a corpus in two JSON Lines files, train and held out: name, sha256 and text on each line."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.heldout import MAX_OVERLAP, choose_held_out, held_out_shingles, overlap
from tilewright.corpus.sources import Document, ListedDocument, Listing, Source, read_document

TRAIN = "train.jsonl"
HELD_OUT = "heldout.jsonl"


def write_documents(
    source: Source,
    listing: Listing,
    folder: Path,
    *,
    held_out_fraction: float,
    seed: int,
    progress: Callable[[Sequence[ListedDocument]], Iterable[ListedDocument]],
) -> dict[str, Any]:
    """Choose what is held out, leave out of train what overlaps it, shuffle train, and write both.

    Returns:
        For the manifest: the source, what was dropped from it, the train documents left out with their overlap, and of
        both files the counts and the SHA-256.

    Raises:
        CorpusError: where no document is left to train on, or one changed since it was listed.
    """
    names = choose_held_out(listing.documents, held_out_fraction)
    held_out = [document for document in listing.documents if document.name in names]
    # The seed decides the order in train, so that whoever reads the shards front to back does not meet the alphabet.
    train = sorted(
        (document for document in listing.documents if document.name not in names),
        key=lambda document: hashlib.sha256(f"{seed}:{document.name}".encode()).digest(),
    )
    held_out_facts = _write(folder / HELD_OUT, (read_document(source, listed) for listed in held_out))
    avoided = held_out_shingles(document_texts(folder / HELD_OUT))
    left_out: list[dict[str, Any]] = []

    def without_overlap() -> Iterator[Document]:
        for listed in progress(train):
            document = read_document(source, listed)
            shared = overlap(document.text, avoided)
            if shared > MAX_OVERLAP:
                left_out.append({"name": document.name, "sha256": document.sha256, "overlap": round(shared, 4)})
            else:
                yield document

    train_facts = _write(folder / TRAIN, without_overlap())
    if not train_facts.document_count:
        raise CorpusError(
            f"No document is left to train on: of {len(listing.documents)}, {len(held_out)} are held out and "
            f"{len(left_out)} overlap them; give a source with more documents, or hold out a smaller fraction."
        )
    return {
        "source": source.description,
        "dropped": {"duplicates": listing.duplicates, "empty": listing.empty, "not_utf8": listing.not_utf8},
        "left_out": sorted(left_out, key=lambda document: str(document["name"])),
        "train": asdict(train_facts),
        "heldout": asdict(held_out_facts),
    }


def document_texts(path: Path) -> Iterator[str]:
    """The texts of a file written here, in order."""
    with path.open("rb") as lines:  # in binary, so that only a line feed ends a line
        for line in lines:
            yield json.loads(line)["text"]


@dataclass(frozen=True)
class _FileFacts:
    """`byte_count` counts the UTF-8 bytes of the texts; `sha256` (hex) is that of the file."""

    document_count: int
    byte_count: int
    sha256: str


def _write(path: Path, documents: Iterable[Document]) -> _FileFacts:
    document_count = byte_count = 0
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for document in documents:
            line = json.dumps(asdict(document), ensure_ascii=False).encode("utf-8") + b"\n"
            file.write(line)
            sha256.update(line)
            document_count += 1
            byte_count += len(document.text.encode("utf-8"))
    return _FileFacts(document_count, byte_count, sha256.hexdigest())
