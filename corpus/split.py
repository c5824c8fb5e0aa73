"""The shards of a folder as one stream of tokens, whoever wrote them.

Opening lists the folder and takes every size from the listing, so that ten trillion tokens in twenty thousand shards
open as fast as a directory is read. A shard's file is opened when a token of it is first asked for, and its index when
a boundary is; that is also when the index is held against the tokens. The shards read last stay open, never more than
`OPEN_SHARDS` of them.
"""

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.shards import INDEX_ENTRY, MANIFEST

OPEN_SHARDS = 32

_BLOCK = 512  # index entries read at a time, which is a page


class Split:
    """The tokens of every shard of a folder, in the order of their names, as one stream; threads may share it.

    Attributes:
        folder: where the shards lie.
        token_count: tokens in the stream; `document_count`: documents in it.
        token_dtype: how the shards store a token, and the dtype of what `read` returns.
        end_of_text: the id that closes documents; None where neither a manifest nor the caller names it.
        vocab_size: the ids end below it; None where neither a manifest nor the caller names it.
        byte_count, tokenizer_fingerprint: from the manifest; None without one.
        fingerprint: SHA-256 (hex) of the manifest, or without one of the names and sizes of all shards and indexes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, end_of_text: int | None = None, vocab_size: int | None = None
    ) -> None:
        """Open the `*.ds` files of `folder`.

        Args:
            folder: where the shards, their indexes and perhaps a `manifest.json` lie.
            end_of_text, vocab_size: for shards without a manifest; they go before the manifest's.

        Raises:
            CorpusError: where the folder or an index is missing, or the size of a file contradicts the manifest or is
                none that it could have. Reading raises it too, where an index contradicts its tokens.
        """
        self.folder = Path(folder)
        sizes = _shard_sizes(self.folder)
        token_size = _token_size(self.folder, *next((name, size) for name, (size, _) in sizes.items() if size))
        for name, (tokens, index) in sizes.items():
            _check_sizes(self.folder / name, tokens, index, token_size)
        manifest, self.fingerprint = _read_split_manifest(self.folder, sizes)
        _check_manifest(self.folder, manifest, {name: tokens // token_size for name, (tokens, _) in sizes.items()})
        self.token_dtype: np.dtype[Any] = np.dtype(f"<u{token_size}")
        # A shard without tokens holds nothing to read.
        self._names = [name for name, (tokens, _) in sizes.items() if tokens]
        self._ends = np.cumsum([tokens // token_size for tokens, _ in sizes.values() if tokens], dtype=np.int64)
        self.token_count = int(self._ends[-1])
        self.document_count = sum(index for _, index in sizes.values()) // INDEX_ENTRY.itemsize
        self.end_of_text: int | None = manifest.get("end_of_text") if end_of_text is None else end_of_text
        self.vocab_size: int | None = manifest.get("vocab_size") if vocab_size is None else vocab_size
        self.byte_count: int | None = manifest.get("byte_count")
        self.tokenizer_fingerprint: str | None = manifest.get("tokenizer_fingerprint")
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """Tokens start .. start + length - 1 of the stream: (length,), `token_dtype`, a copy.

        Raises:
            IndexError: where the stream does not hold them all.
            CorpusError: where a shard has vanished or been cut short since it was listed.
        """
        tokens = np.empty(length, dtype=self.token_dtype)
        for shard, first, low, high in self._overlapping(start, length):
            self._shard(shard).read(low, tokens[first + low - start : first + high - start])
        return tokens

    def document_boundaries(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Where documents end: the distinct places e with start < e <= start + length, ascending, int64.

        A place counts tokens from the start of the stream: token e - 1 is the last of one document and token e, where
        there is one, the first of the next.

        Raises:
            IndexError: where the stream does not hold those tokens.
            CorpusError: where an index does not end where its shard does.
        """
        ends = [np.empty(0, dtype=np.int64)]
        for shard, first, low, high in self._overlapping(start, length):
            _, inside = self._shard(shard).index.between(low, high)
            ends.append(inside + first)
        return np.unique(np.concatenate(ends))

    def documents(self, start: int, length: int) -> list[tuple[str, int]]:
        """The documents that tokens start .. start + length - 1 belong to: each its shard's name and number there.

        Raises:
            IndexError, CorpusError: as `document_boundaries`.
        """
        found = []
        for shard, _, low, high in self._overlapping(start, length):
            number, ends = self._shard(shard).index.between(low, high - 1)
            found += [(self._names[shard], number + place) for place in range(len(ends) + 1)]
        return found

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

    def _shard(self, number: int) -> "_Shard":
        """A shard, kept among those used last."""
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                first = int(self._ends[number - 1]) if number else 0
                shard = _Shard(self.folder / self._names[number], int(self._ends[number]) - first)
            self._open[number] = shard
            if len(self._open) > OPEN_SHARDS:
                # Its files close once no thread reads them any more.
                self._open.popitem(last=False)
        return shard


class _Shard:
    """The two files of a shard, each opened when it is first needed.

    Both are read by plain reads, not through a memory map: they let other threads run while a disk or a network seeks,
    count for no memory of this process, and where a file has been cut short say so, which a map answers by killing the
    process.
    """

    def __init__(self, path: Path, token_count: int) -> None:
        self._path, self._token_count = path, token_count

    def read(self, low: int, tokens: npt.NDArray[Any]) -> None:
        """Fill `tokens` with those from token `low` of the shard on."""
        _read(self._tokens, tokens.view(np.uint8).data, low * tokens.itemsize)

    @cached_property
    def index(self) -> "_Index":
        """Where documents end, found to end where the shard does."""
        index = _Index(_opened(_index_path(self._path)))
        if index.last != self._token_count:
            raise CorpusError(
                f"{self._path} holds {self._token_count} tokens but its index ends at {index.last}; one of the two was "
                "cut short or belongs to another shard: copy or build both again."
            )
        return index

    @cached_property
    def _tokens(self) -> FileIO:
        return _opened(self._path)


class _Index:
    """The entries of an index file, searched without reading more than a few of what may be millions.

    Attributes:
        last: the last entry.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._count = os.fstat(file.fileno()).st_size // INDEX_ENTRY.itemsize
        self._blocks = -(-self._count // _BLOCK)
        self.last = self._last_of(self._blocks - 1)

    def between(self, low: int, high: int) -> tuple[int, npt.NDArray[np.int64]]:
        """The number of the first entry past `low`, which is less than the last, and all from there on up to `high`."""
        block = bisect_right(range(self._blocks), low, key=self._last_of)
        entries = self._block(block)
        passed = int(np.searchsorted(entries, low, side="right"))
        number, found = block * _BLOCK + passed, [entries[passed:]]
        while found[-1][-1] <= high and block + 1 < self._blocks:
            block += 1
            found.append(self._block(block))
        ends = np.concatenate(found)
        return number, ends[: np.searchsorted(ends, high, side="right")]

    def _last_of(self, block: int) -> int:
        number = min((block + 1) * _BLOCK, self._count) - 1
        return int(self._entries(number, 1)[0])

    def _block(self, block: int) -> npt.NDArray[np.int64]:
        return self._entries(block * _BLOCK, min(_BLOCK, self._count - block * _BLOCK))

    def _entries(self, first: int, count: int) -> npt.NDArray[np.int64]:
        entries = np.empty(count, dtype=INDEX_ENTRY)
        _read(self._file, entries.view(np.uint8).data, first * INDEX_ENTRY.itemsize)
        return entries.astype(np.int64)


def _opened(path: Path) -> FileIO:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    if hasattr(os, "posix_fadvise"):
        # Samples lie anywhere: what the kernel would read ahead, megabytes on some machines, would be for nothing.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read(file: FileIO, raw: memoryview, offset: int) -> None:
    while raw:
        try:
            count = os.preadv(file.fileno(), [raw], offset)
        except OSError as error:
            raise _unreadable(Path(str(file.name)), error) from error
        if count == 0:
            raise CorpusError(f"{file.name!s} was cut short since it was opened; copy or build it again.")
        raw, offset = raw[count:], offset + count


def _index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index")


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"Cannot read the shard {path} ({error}); put it back or build it again.")


def _shard_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes of each shard and of its index, by the name of the shard, in the order of names."""
    try:
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith((".ds", ".ds.index"))}
    except OSError as error:
        raise CorpusError(
            f"Cannot open the shards in {folder} ({error.strerror}); build them with `tilewright corpus build` or name "
            "the folder that holds them."
        ) from error
    names = sorted(name for name in sizes if name.endswith(".ds"))
    if not any(sizes[name] for name in names):
        raise CorpusError(f"The folder {folder} holds no tokens in .ds shards; name the folder that does, or build it.")
    without_index = [name for name in names if name + ".index" not in sizes]
    if without_index:
        raise CorpusError(
            f"{folder / without_index[0]} has no .index beside it ({len(without_index)} such shards); copy the "
            "indexes too, or tokenise again with an index."
        )
    return {name: (sizes[name], sizes[name + ".index"]) for name in names}


def _token_size(folder: Path, name: str, shard_bytes: int) -> int:
    """Bytes per token, by the shard's metadata, or by its index where there is none or it does not say."""
    try:
        first_line = (folder / f"{name}.metadata").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        first_line = ""
    size = first_line.rpartition("|")[2]
    if "|" not in first_line:
        # Earlier releases of datatrove write the tokenizer's name alone.
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
            index.seek(max(0, index.seek(0, os.SEEK_END) - INDEX_ENTRY.itemsize))
            return int.from_bytes(index.read(), "little")
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_sizes(shard: Path, shard_bytes: int, index_bytes: int, token_size: int) -> None:
    if shard_bytes % token_size:
        raise CorpusError(
            f"{shard} has {shard_bytes} bytes, not a multiple of the {token_size} of a token; it was cut short or "
            "damaged: copy or build it again."
        )
    if index_bytes % INDEX_ENTRY.itemsize or (shard_bytes and not index_bytes):
        raise CorpusError(
            f"{_index_path(shard)} has {index_bytes} bytes, not a multiple of {INDEX_ENTRY.itemsize} above 0; it was "
            "cut short: copy or build it again."
        )


def _read_split_manifest(folder: Path, sizes: dict[str, tuple[int, int]]) -> tuple[dict[str, Any], str]:
    """The manifest, empty where there is none, and what tells these shards from others."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        return {}, hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    except (OSError, ValueError) as error:
        raise CorpusError(f"Cannot read {path} ({error}); mend it or build the shards again.") from error
    if not isinstance(manifest, dict):
        raise CorpusError(f"{path} is not a manifest of shards; remove it or build the shards again.")
    return manifest, hashlib.sha256(raw).hexdigest()


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
