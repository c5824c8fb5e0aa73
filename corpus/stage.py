"""A stage of a build: a folder that is either wholly there and named for what it was made from, or not there.

A stage is built in a hidden folder beside its place and moved into it at the end, its `manifest.json` written last. The
manifest holds the `key`, a hash of everything the stage depends on, and the size of every file; only where both agree
is the stage current. So an interrupted build, whatever interrupts it, leaves the earlier stage or none, never half of
one.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.shards import MANIFEST

_BUILDING = ".building-"


def key_of(**dependencies: Any) -> str:
    """SHA-256 (hex) of the dependencies, which JSON must be able to write."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode("utf-8")).hexdigest()


def ensure_stage(folder: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """The facts of a stage and whether it was there already; where it is not, `build` makes it.

    Args:
        folder: where the stage stands or will stand.
        key: of what it depends on.
        build: fills the empty folder it is given and returns the facts to record, which JSON must be able to write.
    """
    manifest = read_stage(folder)
    if manifest is not None and manifest["key"] == key:
        return dict(manifest["facts"]), True
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise CorpusError(
            f"{folder} exists and was not made by a corpus build (it has no {MANIFEST}); give another output folder "
            "or move it away."
        )
    building = _hidden_sibling(folder)
    try:
        facts = build(building)
        manifest = {"key": key, "facts": facts, "file_bytes": _file_bytes(building)}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        # mkdtemp makes folders that only their owner may read.
        building.chmod(0o755)
        _move_into_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return facts, False


def read_stage(folder: Path) -> dict[str, Any] | None:
    """The manifest ("key", "facts", "file_bytes") of a stage that is whole; None where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        whole = manifest["file_bytes"] == _file_bytes(folder)
        return {"key": manifest["key"], "facts": dict(manifest["facts"])} if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def only_builder(output: Path) -> Iterator[None]:
    """Hold the output folder, made if need be, for one build, and clear away what killed builds left in it.

    Raises:
        CorpusError: where another build holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(
                f"Another build is at work in {output}; wait until it is done, or give another output folder."
            ) from error
        except OSError:
            pass  # some network file systems have no locks; there, two builds are not held apart
        for leftover in output.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _move_into_place(building: Path, folder: Path) -> None:
    if folder.exists():
        # A folder cannot be renamed over one that holds files: the old one goes into the new one's neighbour first.
        aside = _hidden_sibling(folder)
        try:
            os.replace(folder, aside / folder.name)
            os.replace(building, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(building, folder)


def _hidden_sibling(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{folder.name}-", dir=folder.parent))


def _file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder` by relative POSIX path, the stage's own manifest left out."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
