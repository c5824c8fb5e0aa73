"""What a checkpoint is where it is stored: its files, their fingerprints, and the marker that makes it count."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.trainer.checkpoints.storage import Location, location, remove_folder, size_of, write_whole

MARKER = "COMMITTED.json"
METADATA = ".metadata"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: where it is, and the step after which it was taken."""

    path: Location
    step: int


class HeldOut(NamedTuple):
    """How a model was scored: its loss in nats a token, and over how many tokens, which tell the text apart."""

    loss: float
    tokens: int | None


class Fingerprint(NamedTuple):
    """What tells a file from another: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    digest: str

    @classmethod
    def of(cls, path: Location) -> Fingerprint:
        """That of a file as it is now, which is read whole."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(size_of(path), digest)


def checkpoint_folder(run: Path, folder: str = "") -> Location:
    """Where the checkpoints of a run lie: in its directory, or under its name in `folder`, ``checkpoints.folder``.

    Raises:
        TrainingError: `folder` is on a file system that nothing here can read; see `location`.
    """
    return location(folder) / run.resolve().name if folder else run / "checkpoints"


def checkpoint_of(folder: Location, step: int) -> Committed:
    """What the checkpoint of a step is called."""
    return Committed(folder / f"step-{step:08d}", step)


def committed(run: Path, folder: str = "") -> list[Committed]:
    """The committed checkpoints of a run, oldest first; see `checkpoint_folder`.

    Raises:
        OSError: the folder cannot be read.
    """
    return committed_in(checkpoint_folder(run, folder))


def committed_in(folder: Location) -> list[Committed]:
    """The committed checkpoints that lie in a folder, oldest first.

    Raises:
        OSError: it cannot be read.
    """
    return [checkpoint for checkpoint in _named_in(folder) if (checkpoint.path / MARKER).is_file()]


def uncommitted_in(folder: Location) -> list[Location]:
    """What was left of checkpoints that were never committed, or were being removed, when their process died."""
    return [checkpoint.path for checkpoint in _named_in(folder) if not (checkpoint.path / MARKER).is_file()]


def commit(checkpoint: Committed, files: Mapping[str, Fingerprint], heldout: HeldOut | None) -> None:
    """Put the marker in place, whole or not at all, and make the names of all files durable.

    Args:
        files: every file of the checkpoint by name; their contents are stored.
        heldout: of the model in it, where it was evaluated.
    """
    marker: dict[str, Any] = {"format": FORMAT, "step": checkpoint.step, "files": files}
    if heldout is not None:
        marker |= {"heldout_loss": heldout.loss, "heldout_tokens": heldout.tokens}
    write_whole(checkpoint.path / MARKER, json.dumps(marker, indent=1))
    if isinstance(checkpoint.path, Path):
        for directory in (checkpoint.path, checkpoint.path.parent, checkpoint.path.parent.parent):
            _sync_directory(directory)


def marked_files(checkpoint: Committed) -> dict[str, Fingerprint]:
    """The files that the marker names.

    Raises:
        ValueError: the marker is missing, or not one that this version wrote.
        OSError: it cannot be read, which says nothing of what it holds.
    """
    try:
        marker = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))
        files = {str(name): Fingerprint(int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        in_the_folder = all("/" not in name and name not in ("", ".", "..") for name in files)
        fits = marker["format"] == FORMAT and marker["step"] == checkpoint.step and METADATA in files and in_the_folder
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{checkpoint.path / MARKER} is not one that this version wrote")
    return files


def recorded_heldout(checkpoint: Committed) -> HeldOut | None:
    """What the marker records of held-out text; None where there is nothing, or no number.

    Raises:
        OSError: the marker cannot be read, and may record it.
    """
    try:
        marker = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))
        loss, tokens = marker.get("heldout_loss"), marker.get("heldout_tokens")
    except (ValueError, AttributeError):
        return None
    return HeldOut(loss, tokens) if isinstance(loss, float) and math.isfinite(loss) else None


def discard(path: Location) -> None:
    """Remove what is named like a checkpoint; if that is cut short, what is left does not count as one.

    Raises:
        OSError: it is committed and stays so, for its marker cannot be removed.
    """
    (path / MARKER).unlink(missing_ok=True)
    remove_folder(path)


def _named_in(folder: Location) -> list[Committed]:
    """Whatever is named like a checkpoint, oldest first."""
    if isinstance(folder, Path) and not folder.is_dir():
        return []
    named = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted((Committed(path, int(name[1])) for path, name in named if name), key=lambda found: found.step)


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as fsync makes the contents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
