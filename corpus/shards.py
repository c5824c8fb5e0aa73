"""Token shards in datatrove's tokenised layout: what they are, and how they are written; `corpus/split.py` reads them.

One shard is three files. `NAME.ds` holds the tokens, little-endian, two bytes each (four where the vocabulary exceeds
65,536). `NAME.ds.index` holds, as little-endian uint64, where each document ends, counted in tokens from the start of
the shard. `NAME.ds.metadata` is text: `tokenizer name|bytes per token`, the token count, and that count for human
readers. Every document written here ends with one end-of-text token, which the index counts as part of it.

Beside the shards of a split, `manifest.json` records what the files themselves cannot say: the tokenizer's fingerprint,
the end-of-text id, the vocabulary size, the UTF-8 bytes that were tokenised, and each shard's SHA-256. Shards from
elsewhere have none and need none.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

MANIFEST = "manifest.json"

INDEX_ENTRY = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How one token is stored for a vocabulary of that size."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest records of one shard; `sha256` (hex) is that of the `.ds` file."""

    name: str
    token_count: int
    document_count: int
    sha256: str


class ShardWriter:
    """Writes documents into `00000.ds`, `00001.ds`, ... of a folder; a context manager.

    A shard is closed after the document that brings it to `tokens_per_shard`, so no document spans two.
    """

    def __init__(self, folder: Path, *, tokenizer_name: str, vocab_size: int, tokens_per_shard: int) -> None:
        self._folder = folder
        self._tokenizer_name = tokenizer_name
        self._dtype = token_dtype(vocab_size)
        self._tokens_per_shard = tokens_per_shard
        self._tokens: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._token_count = self._document_count = 0
        self._sha256 = hashlib.sha256()
        self.shards: list[ShardFacts] = []

    def write(self, document: Sequence[int]) -> None:
        """Append one document, its end-of-text token included; `OverflowError` for an id that the shard cannot hold."""
        if self._tokens is None or self._index is None:
            self._tokens = self._path().open("wb")
            self._index = self._path(".index").open("wb")
        raw = np.asarray(document, dtype=self._dtype).tobytes()
        self._tokens.write(raw)
        self._sha256.update(raw)
        self._token_count += len(document)
        self._document_count += 1
        self._index.write(np.asarray(self._token_count, dtype=INDEX_ENTRY).tobytes())
        if self._token_count >= self._tokens_per_shard:
            self._finish_shard()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._tokens is not None:
            self._finish_shard()
        else:
            self._close()

    def _path(self, ending: str = "") -> Path:
        return self._folder / f"{len(self.shards):05d}.ds{ending}"

    def _finish_shard(self) -> None:
        self._close()
        lines = (
            f"{self._tokenizer_name}|{self._dtype.itemsize}",
            str(self._token_count),
            readable_count(self._token_count, "T"),
        )
        self._path(".metadata").write_text("\n".join(lines), encoding="utf-8")
        facts = ShardFacts(self._path().name, self._token_count, self._document_count, self._sha256.hexdigest())
        self.shards.append(facts)
        self._token_count = self._document_count = 0
        self._sha256 = hashlib.sha256()

    def _close(self) -> None:
        for file in (self._tokens, self._index):
            if file is not None:
                file.close()
        self._tokens = self._index = None


def write_split_manifest(
    folder: Path,
    shards: Sequence[ShardFacts],
    *,
    byte_count: int,
    end_of_text: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
) -> None:
    """Write the `manifest.json` that `Split` reads; `byte_count` counts the UTF-8 bytes of the texts alone."""
    manifest = {
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "end_of_text": end_of_text,
        "vocab_size": vocab_size,
        "token_count": sum(shard.token_count for shard in shards),
        "document_count": sum(shard.document_count for shard in shards),
        "byte_count": byte_count,
        "shards": [asdict(shard) for shard in shards],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def readable_count(count: int, unit: str) -> str:
    """Three significant digits and a metric prefix: 3_400_000 of unit "T" is "3.40 MT"."""
    power = min(len(str(count)) - 1, 15) // 3 if count else 0
    scaled = count / 1000**power
    decimals = max(0, 3 - len(str(int(scaled))))
    return f"{scaled:.{decimals}f} {' kMGTP'[power].strip()}{unit}"
