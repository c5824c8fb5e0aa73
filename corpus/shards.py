"""Token shards in datatrove's tokenised layout: written here, and read here whoever wrote them.

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
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tilewright.corpus.errors import CorpusError

MANIFEST = "manifest.json"

_INDEX_ENTRY = np.dtype("<u8")
_OPEN_SHARDS = 32


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
        self._index.write(np.asarray(self._token_count, dtype=_INDEX_ENTRY).tobytes())
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


class Split:
    """The tokens of every shard of a folder, in the order of their names, as one stream.

    Opening looks at file sizes and at the last entry of each index. Tokens and indexes are mapped into memory when they
    are first read, a few shards at a time, so that the size of a corpus costs neither time nor memory.

    Attributes:
        folder: where the shards lie.
        token_count: tokens in the stream; `document_count`: documents in it.
        token_dtype: how the shards store a token, and the dtype of what `read` returns.
        end_of_text: the id that closes documents; None where neither a manifest nor the caller names it.
        vocab_size, byte_count, tokenizer_fingerprint: from the manifest; None without one.
    """

    def __init__(self, folder: str | os.PathLike[str], *, end_of_text: int | None = None) -> None:
        """Open the `*.ds` files of `folder`.

        Args:
            folder: where the shards, their indexes and perhaps a `manifest.json` lie.
            end_of_text: for shards without a manifest; it goes before the manifest's.

        Raises:
            CorpusError: where the folder or an index is missing, or what a shard holds contradicts its index or the
                manifest.
        """
        self.folder = Path(folder)
        token_bytes, index_bytes = _shard_sizes(self.folder)
        manifest = _read_split_manifest(self.folder)
        names = sorted(token_bytes)
        token_size = _token_size(self.folder, names[0], token_bytes[names[0]])
        self.token_dtype: np.dtype[Any] = np.dtype(f"<u{token_size}")
        counts = [_checked_token_count(self.folder / name, token_bytes[name], token_size) for name in names]
        _check_manifest(self.folder, manifest, dict(zip(names, counts, strict=True)))
        # A shard without tokens cannot be mapped and holds nothing to read.
        self._names = [name for name, count in zip(names, counts, strict=True) if count]
        self._ends = np.cumsum([count for count in counts if count], dtype=np.int64)
        self.token_count: int = sum(counts)
        self.document_count: int = sum(index_bytes[name] for name in names) // _INDEX_ENTRY.itemsize
        self.end_of_text: int | None = manifest.get("end_of_text") if end_of_text is None else end_of_text
        self.vocab_size: int | None = manifest.get("vocab_size")
        self.byte_count: int | None = manifest.get("byte_count")
        self.tokenizer_fingerprint: str | None = manifest.get("tokenizer_fingerprint")
        self._mapped: OrderedDict[int, tuple[mmap.mmap, mmap.mmap]] = OrderedDict()

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Tokens start .. start + length - 1 of the stream: (length,), `token_dtype`, a copy.

        Raises:
            IndexError: where the stream does not hold them all.
        """
        tokens = np.empty(length, dtype=self.token_dtype)
        for shard, first, low, high in self._overlapping(start, length):
            tokens[first + low - start : first + high - start] = self._tokens(shard, low, high)
        return tokens

    def document_boundaries(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Where documents end: the distinct places e with start < e <= start + length, ascending, int64.

        A place counts tokens from the start of the stream: token e - 1 is the last of one document and token e, where
        there is one, the first of the next.

        Raises:
            IndexError: where the stream does not hold those tokens.
        """
        ends = [np.empty(0, dtype=np.int64)]
        for shard, first, low, high in self._overlapping(start, length):
            index = np.frombuffer(self._map(shard)[1], dtype=_INDEX_ENTRY)
            # A key of another dtype than the index would make NumPy convert, and so read, the whole index.
            keys = np.array([low, high], dtype=_INDEX_ENTRY)
            after_low, after_high = np.searchsorted(index, keys, side="right")
            ends.append(index[after_low:after_high].astype(np.int64) + first)
        return np.unique(np.concatenate(ends))

    def _overlapping(self, start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, its first token in the stream, low, high) for each stretch low .. high - 1 of a shard in range."""
        stop = start + length
        if not 0 <= start <= stop <= self.token_count:
            raise IndexError(f"tokens {start} to {stop} of {self.folder}, which holds {self.token_count}")
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[shard - 1]) if shard else 0
            end = min(stop, int(self._ends[shard]))
            yield shard, first, start - first, end - first
            start, shard = end, shard + 1

    def _tokens(self, shard: int, low: int, high: int) -> npt.NDArray[Any]:
        """Tokens low .. high - 1 of a shard, as its memory map holds them."""
        mapped, size = self._map(shard)[0], self.token_dtype.itemsize
        page = low * size // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, high * size - page)
        return np.frombuffer(mapped, dtype=self.token_dtype, count=high - low, offset=low * size)

    def _map(self, shard: int) -> tuple[mmap.mmap, mmap.mmap]:
        """The tokens and the index of a shard; the shards used last stay mapped."""
        mapped = self._mapped.pop(shard, None)
        if mapped is None:
            path = self.folder / self._names[shard]
            mapped = _map_file(path), _map_file(_index_path(path))
        self._mapped[shard] = mapped
        if len(self._mapped) > _OPEN_SHARDS:
            self._mapped.popitem(last=False)
        return mapped


def readable_count(count: int, unit: str) -> str:
    """Three significant digits and a metric prefix: 3_400_000 of unit "T" is "3.40 MT"."""
    power = min(len(str(count)) - 1, 15) // 3 if count else 0
    scaled = count / 1000**power
    decimals = max(0, 3 - len(str(int(scaled))))
    return f"{scaled:.{decimals}f} {' kMGTP'[power].strip()}{unit}"


def _index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index")


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CorpusError(f"Cannot read the shard {path} ({error}); put it back or build it again.") from error
    # Samples lie anywhere: what the kernel would read ahead, megabytes on some machines, would all be for nothing.
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _shard_sizes(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each shard and of each shard's index, both by the name of the shard."""
    try:
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith((".ds", ".ds.index"))}
    except OSError as error:
        raise CorpusError(
            f"Cannot open the shards in {folder} ({error.strerror}); build them with `tilewright corpus build` or name "
            "the folder that holds them."
        ) from error
    shards = {name: size for name, size in sizes.items() if name.endswith(".ds")}
    if not any(shards.values()):
        raise CorpusError(f"The folder {folder} holds no tokens in .ds shards; name the folder that does, or build it.")
    without_index = [name for name in shards if name + ".index" not in sizes]
    if without_index:
        raise CorpusError(
            f"{folder / min(without_index)} has no .index beside it ({len(without_index)} such shards); copy the "
            "indexes too, or tokenise again with an index."
        )
    return shards, {name: sizes[name + ".index"] for name in shards}


def _token_size(folder: Path, name: str, shard_bytes: int) -> int:
    """Bytes per token, by the shard's metadata, or by its index where it has none."""
    try:
        size = (folder / f"{name}.metadata").read_text(encoding="utf-8").partition("\n")[0].rpartition("|")[2]
    except OSError:
        documents_end = _last_end(folder / name)
        size = str(shard_bytes // documents_end) if documents_end else "2"
    if size not in ("2", "4"):
        raise CorpusError(
            f"The tokens of {folder / name} would be of {size!r} bytes by its metadata or index, not of 2 or 4; one of "
            "these files is damaged: copy or build the shard again."
        )
    return int(size)


def _last_end(shard: Path) -> int:
    """The last entry of a shard's index: how many tokens it should hold."""
    path = _index_path(shard)
    try:
        with path.open("rb") as index:
            size = index.seek(0, os.SEEK_END)
            index.seek(max(0, size - _INDEX_ENTRY.itemsize))
            entry = index.read()
    except OSError as error:
        raise CorpusError(f"Cannot read {path} ({error.strerror}); mend that, or copy or build it again.") from error
    if size % _INDEX_ENTRY.itemsize:
        raise CorpusError(f"{path} has {size} bytes, not a multiple of 8; it was cut short: copy or build it again.")
    return int.from_bytes(entry, "little")


def _checked_token_count(shard: Path, shard_bytes: int, token_size: int) -> int:
    if shard_bytes % token_size:
        raise CorpusError(
            f"{shard} has {shard_bytes} bytes, not a multiple of the {token_size} of a token; it was cut short or "
            "damaged: copy or build it again."
        )
    documents_end = _last_end(shard)
    if documents_end != shard_bytes // token_size:
        raise CorpusError(
            f"{shard} holds {shard_bytes // token_size} tokens but its index ends at {documents_end}; one of the two "
            "was cut short or belongs to another shard: copy or build both again."
        )
    return documents_end


def _read_split_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CorpusError(f"Cannot read {path} ({error}); mend it or build the shards again.") from error
    if not isinstance(manifest, dict):
        raise CorpusError(f"{path} is not a manifest of shards; remove it or build the shards again.")
    return manifest


def _check_manifest(folder: Path, manifest: dict[str, Any], token_counts: dict[str, int]) -> None:
    if not manifest:
        return
    recorded = {shard.get("name"): shard.get("token_count") for shard in manifest.get("shards", [])}
    if recorded != token_counts:
        differing = sorted(
            name for name in recorded.keys() | token_counts.keys() if recorded.get(name) != token_counts.get(name)
        )
        raise CorpusError(
            f"The manifest of {folder} does not list what lies there: {', '.join(differing[:3])} differ "
            f"({len(differing)} in all); build the shards again, or remove the manifest if they are not its own."
        )
