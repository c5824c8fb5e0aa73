"""An object store for tests: fsspec's face over a folder, with the manners of the real ones.

Keys are flat, folders are what keys begin with, an object is there once it is whole and renamed never, and errors are
no OSErrors. ``bucket:///tmp/x.store/runs/a`` is the object ``runs/a`` in the folder ``/tmp/x.store``, which processes
share.
"""

import os
import uuid
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem


class StoreError(Exception):
    """What goes wrong in a store, as its own package would tell it."""


class ObjectStore(AbstractFileSystem):
    """The store.

    Attributes:
        failing: what an object whose name contains this raises when it is to appear.
        refused: what asking after an object whose name contains this raises.
        unread: what opening an object whose name contains this raises, though it can be asked after.
        unlisted: keys that contain this are not listed yet.
    """

    protocol = "bucket"
    failing: ClassVar[str | None] = None
    refused: ClassVar[str | None] = None
    unread: ClassVar[str | None] = None
    unlisted: ClassVar[str | None] = None

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self._asked(path)
        if mode == "rb":
            if self.unread is not None and self.unread in path:
                raise StoreError("ServiceUnavailable")
            return self._file(path).open("rb")
        return Upload(self, path)

    def appear(self, path: str, upload: Path) -> None:
        """Put what was uploaded in its place."""
        if self.failing is not None and self.failing in path:
            raise StoreError("SlowDown: please reduce your request rate")
        upload.replace(self._file(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._asked(path)
        if self._file(path).is_file():
            return {"name": path, "size": self._file(path).stat().st_size, "type": "file"}
        if self._keys(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self._asked(path)
        below = [key[len(path) + 1 :] for key in self._keys(path)]
        shown = [name for name in below if self.unlisted is None or self.unlisted not in name]
        if not shown:
            raise FileNotFoundError(path)
        names = [f"{path}/{name}" for name in dict.fromkeys(name.split("/")[0] for name in shown)]
        return [self.info(name) for name in names] if detail else names

    def rm_file(self, path: str) -> None:
        self._file(self._strip_protocol(path)).unlink()

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        with self.open(path1) as source, self.open(path2, "wb") as target:
            target.write(source.read())

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are none to make."""

    def _asked(self, path: str) -> None:
        if self.refused is not None and self.refused in path:
            raise StoreError("ServiceUnavailable")

    def _keys(self, prefix: str) -> list[str]:
        root = self._file(prefix).parent
        keys = [str(root / unquote(name)) for name in os.listdir(root)] if root.is_dir() else []
        return sorted(key for key in keys if key.startswith(prefix.rstrip("/") + "/"))

    @staticmethod
    def _file(path: str) -> Path:
        root, mark, key = path.partition(".store")
        return Path(root + mark) / quote(key.strip("/"), safe="")


class Upload:
    """An object in the making, which nobody sees."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        self._store, self._path = store, path
        root = store._file(path).parent
        root.with_name(root.name + "-uploads").mkdir(parents=True, exist_ok=True)
        root.mkdir(exist_ok=True)
        self._part = root.with_name(root.name + "-uploads") / uuid.uuid4().hex
        self._file = self._part.open("wb")
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """It is whole."""
        if not self.closed:
            self.closed = True
            self._file.close()
            self._store.appear(self._path, self._part)

    def discard(self) -> None:
        """Throw away what was uploaded; as with fsspec's own files, closing still makes an object."""
        self._file.truncate(0)

    def __del__(self) -> None:
        self.close()


fsspec.register_implementation("bucket", ObjectStore, clobber=True)
