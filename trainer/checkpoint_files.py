"""What a checkpoint is on disk: its files, their fingerprints, and the marker that makes it count."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tilewright.trainer.run_directory import write_atomically

MARKER = "COMMITTED.json"
METADATA = ".metadata"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: where it is, and the step after which it was taken."""

    path: Path
    step: int


class Fingerprint(NamedTuple):
    """What tells a file from another: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """That of a file as it is now, which is read whole."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)


def checkpoint_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def committed(run: Path) -> list[Committed]:
    """The committed checkpoints of a run, oldest first."""
    return [checkpoint for checkpoint in _directories(run) if (checkpoint.path / MARKER).is_file()]


def uncommitted(run: Path) -> list[Path]:
    """What was left of checkpoints that were never committed, or were being removed, when their process died."""
    return [checkpoint.path for checkpoint in _directories(run) if not (checkpoint.path / MARKER).is_file()]


def commit(checkpoint: Committed, files: Mapping[str, Fingerprint], heldout_loss: float | None) -> None:
    """Put the marker in place, by one atomic rename, and make the names of all files durable.

    Args:
        files: every file of the checkpoint by name; their contents are on disk.
        heldout_loss: of the model in it, in nats a token, where it was evaluated.
    """
    marker = {"format": FORMAT, "step": checkpoint.step, "heldout_loss": heldout_loss, "files": files}
    write_atomically(checkpoint.path / MARKER, json.dumps(marker, indent=1))
    for directory in (checkpoint.path, checkpoint.path.parent, checkpoint.path.parent.parent):
        _sync_directory(directory)


def marked_files(checkpoint: Committed) -> dict[str, Fingerprint]:
    """The files that the marker names.

    Raises:
        ValueError: the marker is not one that this version wrote.
    """
    try:
        marker = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))
        files = {str(name): Fingerprint(int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        fits = marker["format"] == FORMAT and marker["step"] == checkpoint.step and METADATA in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{checkpoint.path / MARKER} is not one that this version wrote")
    return files


def recorded_loss(checkpoint: Committed) -> float | None:
    """The loss on held-out text that the marker records, in nats a token; None where there is none."""
    try:
        loss = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8")).get("heldout_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def discard(path: Path) -> None:
    """Remove what is named like a checkpoint; if that is cut short, what is left does not count as one.

    Raises:
        OSError: it is committed and stays so, for its marker cannot be removed.
    """
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _directories(run: Path) -> list[Committed]:
    """Whatever is named like a checkpoint, oldest first."""
    named = [(path, _NAME.fullmatch(path.name)) for path in (run / "checkpoints").glob("step-*")]
    return sorted((Committed(path, int(name[1])) for path, name in named if name), key=lambda found: found.step)


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as fsync makes the contents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
