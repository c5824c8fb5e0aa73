"""Where checkpoints lie: a local folder, or one of an object store that fsspec knows.

A local place is a `pathlib.Path`; `RemotePath` has those methods of it that checkpoints need, so that one code serves
both. An object store renames nothing: an object is whole once its file is closed, and not there before, so what must
come last is simply written last. Whether a file is there is asked by its name and never read off a listing, which may
be late, and never taken from fsspec's own memory of the store; a store that does not answer raises.

Other file systems of fsspec (``sftp://``, ``hdfs://``, ``smb://``, ``ftp://``) show a file while it is being written,
so a crash may leave half a marker, which counts. Mounted they are local folders, where the marker comes by a rename.
"""

from __future__ import annotations

import difflib
import errno
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint.filesystem import FileSystemBase

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.run_directory import write_atomically

_T = TypeVar("_T")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an fsspec file system, by its URL, such as ``s3://bucket/runs/quickstart-001``.

    Every method raises OSError, of whatever kind the file system's own error was.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self.url.rstrip("/").rsplit("/", 1)[0])

    def is_file(self) -> bool:
        """Whether a file of this name is there."""
        try:
            return bool(self._info()["type"] == "file")
        except FileNotFoundError:
            return False

    def size(self) -> int:
        """In bytes, of a file."""
        return int(self._info()["size"])

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in this folder; nothing where there is no such folder."""

        def names(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]

        with suppress(FileNotFoundError):
            yield from (self / name for name in dict.fromkeys(self._ask(names)) if name not in ("", self.name))

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        """The file, ``rb`` or ``wb``; what is written is there once the ``with`` block has ended without an error."""
        file = RemoteFile(self, self._ask(lambda fs, path: fs.open(path, mode)))
        try:
            yield file
        except BaseException:
            file.abandon()
            raise
        file.close()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole of a file."""
        with self.open("rb") as file:
            return str(file.read().decode(encoding))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder, where the file system has folders."""
        self._ask(lambda fs, path: fs.makedirs(path, exist_ok=exist_ok))

    def rename(self, target: RemotePath) -> None:
        """Move a file, which an object store copies."""
        self._ask(lambda fs, path: fs.mv(path, target._ask(lambda _, other: other)))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            self._ask(lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_folder(self) -> None:
        """Remove the folder with what is in it, as far as can be."""
        with suppress(OSError):
            self._ask(lambda fs, path: (fs.invalidate_cache(), fs.rm(path, recursive=True)))

    def _info(self) -> dict[str, Any]:
        return self._ask(lambda fs, path: (fs.invalidate_cache(), fs.info(path))[1])

    def _ask(self, question: Callable[[Any, str], _T]) -> _T:
        """What `question` comes to, given the file system and this path in it."""
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            fs, path = url_to_fs(self.url)
            return question(fs, path)
        except Exception as error:
            raise _as_os_error(error, self) from error


class RemoteFile:
    """An open file of an fsspec file system, whose errors are OSErrors."""

    def __init__(self, path: RemotePath, file: Any) -> None:
        self._path, self._file = path, file

    def abandon(self) -> None:
        """Let go of the file, and of what was written to it: closing it would have half of it come to be."""
        with suppress(Exception):  # some have nothing to discard, or none such method
            self._file.discard()
        with suppress(AttributeError):
            self._file.closed = True  # else fsspec's files close themselves when they are deleted

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._file, name)
        if not callable(attribute):
            return attribute

        def called(*args: Any, **options: Any) -> Any:
            try:
                return attribute(*args, **options)
            except Exception as error:
                raise _as_os_error(error, self._path) from error

        return called


Location = Path | RemotePath


def location(text: str, key: str = "checkpoints.folder") -> Location:
    """The place that a recipe names: a local path, ``file://`` and ``local://`` included, or another file system's URL.

    Args:
        key: of the recipe, for the error.

    Raises:
        TrainingError: fsspec knows no such file system, or the package for it is not installed.
    """
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return Path(text)
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        import fsspec  # type: ignore[import-untyped]

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise TrainingError(
            f"{key} is {text}, and the package for {scheme}:// is missing: {str(error).rstrip('.')}; install it with "
            "pip, or name another folder"
        ) from None
    except ValueError:
        nearest = difflib.get_close_matches(scheme, fsspec.available_protocols(), 1, 0.5)
        hint = f"; is {nearest[0]}:// meant?" if nearest else ""
        raise TrainingError(f"{key} is {text}, and fsspec knows no file system {scheme}://{hint}") from None
    return RemotePath(text)


def size_of(path: Location) -> int:
    """The size of a file in bytes."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def write_whole(path: Location, text: str) -> None:
    """Write a file so that no reader, nor a crash, meets half of it."""
    if isinstance(path, Path):
        write_atomically(path, text)
        return
    with path.open("wb") as file:
        file.write(text.encode())


def remove_folder(path: Location) -> None:
    """Remove a folder with what is in it, as far as can be."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.remove_folder()


class Files(FileSystemBase):
    """What DCP reads and writes through, at any `Location`."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """A file, opened in `mode`."""
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        """A file in a folder."""
        return path / suffix

    def init_path(self, path: Any) -> Any:
        """The path as it is."""
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file."""
        path.rename(new_path)

    def mkdir(self, path: Any) -> None:
        """Make a folder, if it is not there."""
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        """Whether a file is there."""
        return bool(path.is_file())

    def rm_file(self, path: Any) -> None:
        """Remove a file."""
        path.unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any will do."""
        return True


def _as_os_error(error: Exception, path: RemotePath) -> OSError:
    """File systems have errors of their own (botocore's, aiohttp's, Google's), of which most are no OSError."""
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}".splitlines()[0], str(path))
