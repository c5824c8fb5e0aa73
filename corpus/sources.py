"""Where documents come from: the standard library of this Python, a folder of text files, or one JSON Lines file.

A source is read twice. `list_documents` goes over everything once and keeps names and hashes alone, which is what tells
whether a corpus built earlier is still current; only when it is not does `read_document` fetch the texts, in any order.
"""

import hashlib
import json
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tilewright.corpus.errors import CorpusError

DEFAULT_SUFFIXES = (".txt", ".md")

# Below the standard library: packages that were installed into it, its own tests, caches, and the build's
# configuration.
_OUTSIDE_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text with the name it has in its source and the SHA-256 (hex) of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class ListedDocument:
    """What is remembered of a document while its text is not in memory; `byte_count` counts UTF-8 bytes."""

    name: str
    sha256: str
    byte_count: int


@dataclass(frozen=True)
class Listing:
    """The documents of a source in its order, and how many were dropped from it and why."""

    documents: tuple[ListedDocument, ...]
    duplicates: int
    empty: int
    not_utf8: int

    @property
    def byte_count(self) -> int:
        return sum(document.byte_count for document in self.documents)


class Source(ABC):
    """Named byte strings in a fixed order that can be read again one by one."""

    description: str

    @abstractmethod
    def texts(self) -> Iterator[tuple[str, bytes]]:
        """Every (name, bytes), in an order that depends on the source alone."""

    @abstractmethod
    def text(self, name: str) -> bytes:
        """The bytes of the document of that name."""


def open_source(source: str | os.PathLike[str], *, suffixes: Collection[str] = ()) -> Source:
    """The source that `source` names.

    Args:
        source: "stdlib"; a folder, of which every file whose name ends with one of `suffixes` is a document; or a
            `.jsonl` file, of which the string under "text" on every line is one.
        suffixes: used for a folder alone; none given means `DEFAULT_SUFFIXES`.

    Raises:
        CorpusError: where `source` is none of the three.
    """
    if source == "stdlib":
        return _FolderSource(
            Path(sysconfig.get_path("stdlib")),
            suffixes=(".py",),
            excluded=_is_outside_stdlib,
            description=f"the standard library of Python {platform.python_version()}",
        )
    path = Path(source)
    if path.is_dir():
        return _FolderSource(path, suffixes=tuple(suffixes) or DEFAULT_SUFFIXES, excluded=_is_hidden)
    if path.is_file() and path.suffix == ".jsonl":
        return _JsonLinesSource(path)
    cause = "is a file that does not end in .jsonl" if path.exists() else "does not exist"
    raise CorpusError(f"The source {source} {cause}; give stdlib, a folder of text files or a .jsonl file.")


def list_documents(source: Source) -> Listing:
    """Read all of `source` once; drop what is not UTF-8, what holds nothing but white space, and exact duplicates.

    Of equal documents the first in the source's order stays.

    Raises:
        CorpusError: where no document is left, or a file cannot be read.
    """
    documents: list[ListedDocument] = []
    seen: set[str] = set()
    duplicates = empty = not_utf8 = 0
    for name, raw in source.texts():
        text = _decode(raw)
        sha256 = hashlib.sha256(raw).hexdigest()
        if text is None:
            not_utf8 += 1
        elif not text.strip():
            empty += 1
        elif sha256 in seen:
            duplicates += 1
        else:
            seen.add(sha256)
            documents.append(ListedDocument(name, sha256, len(raw)))
    if not documents:
        raise CorpusError(
            f"The source, {source.description}, holds no document ({empty} empty, {not_utf8} not UTF-8); "
            "give a source with text in it, and for a folder the endings of its files with --suffix."
        )
    return Listing(tuple(documents), duplicates, empty, not_utf8)


def read_document(source: Source, listed: ListedDocument) -> Document:
    """The document with its text.

    Raises:
        CorpusError: where the text is no longer the one that was listed.
    """
    raw = source.text(listed.name)
    if hashlib.sha256(raw).hexdigest() != listed.sha256:
        raise CorpusError(f"{listed.name} changed while the corpus was being built; build it again.")
    return Document(listed.name, raw.decode("utf-8"), listed.sha256)


class _FolderSource(Source):
    """The files below `root` whose names end with one of `suffixes`, named and sorted by relative POSIX path."""

    def __init__(
        self,
        root: Path,
        *,
        suffixes: tuple[str, ...],
        excluded: Callable[[str], bool],
        description: str | None = None,
    ) -> None:
        self.description = description or f"files ending in {', '.join(suffixes)} of the folder {root}"
        self._root = root
        self._suffixes = suffixes
        self._excluded = excluded

    def texts(self) -> Iterator[tuple[str, bytes]]:
        names: list[str] = []
        for folder, subfolders, files in os.walk(self._root):
            subfolders[:] = [name for name in subfolders if not self._excluded(name)]
            paths = [Path(folder, name) for name in files if name.endswith(self._suffixes) and not self._excluded(name)]
            names += [path.relative_to(self._root).as_posix() for path in paths if path.is_file()]
        for name in sorted(names):
            if not _is_unicode(name):
                raise CorpusError(f"The file name {name!r} in {self._root} is not UTF-8; rename that file.")
            yield name, self.text(name)

    def text(self, name: str) -> bytes:
        path = self._root / name
        with _naming(path):
            return path.read_bytes()


class _JsonLinesSource(Source):
    """The "text" of each line of a JSON Lines file; a document is named for the byte at which its line starts."""

    def __init__(self, path: Path) -> None:
        self.description = f"the lines of {path}"
        self._path = path

    def texts(self) -> Iterator[tuple[str, bytes]]:
        offset = 0
        with _naming(self._path), self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{self._path.name}@{offset}", self._text_of(line, f"line {number}")
                offset += len(line)

    def text(self, name: str) -> bytes:
        offset = int(name.rpartition("@")[2])
        with _naming(self._path), self._path.open("rb") as lines:
            lines.seek(offset)
            return self._text_of(lines.readline(), f"the line at byte {offset}")

    def _text_of(self, line: bytes, where: str) -> bytes:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"In {self._path}, {where} is not JSON ({error}); mend or remove that line.") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise CorpusError(f'In {self._path}, {where} has no string under "text"; mend or remove that line.')
        # JSON can escape half of a surrogate pair, which UTF-8 has no bytes for; let through here, it is found to be
        # not UTF-8 and counted with the other such documents.
        return text.encode("utf-8", "surrogatepass")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(f"Cannot read {path} ({error.strerror}); mend that or move it out of the source.") from error


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_unicode(name: str) -> bool:
    # A name on disk that is not UTF-8 reaches Python with lone surrogates in the place of the stray bytes.
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_outside_stdlib(name: str) -> bool:
    return name in _OUTSIDE_STDLIB or name.startswith("config-")


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
