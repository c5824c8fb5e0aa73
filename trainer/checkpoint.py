"""Checkpoints: written with DCP, committed by a marker that comes last, verified before they are read.

A checkpoint is a directory ``checkpoints/step-00000100`` that holds one file of tensors a process, DCP's
``.metadata``, and ``COMMITTED.json``, which names every file with its size and SHA-256. It counts only once the marker
is in place, which one atomic rename does after everything else is on disk, so a run killed at any instant finds its
last committed checkpoint whole. It holds tensors alone, and reading it runs no code from it: tensors are read with
``weights_only``, and the metadata, which DCP pickles, by an unpickler that knows the few classes that belong there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel import World
from tilewright.trainer.run_directory import write_atomically

MARKER = "COMMITTED.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: where it is, and the step after which it was taken."""

    path: Path
    step: int


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: ``model.NAME`` and, with an optimizer, ``optimizer.NAME.STATE``."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, torch.Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
    if optimizer is not None:
        for parameter, tensors in optimizer.state.items():
            state.update({f"optimizer.{names[parameter]}.{key}": value for key, value in tensors.items()})
    return state


def save(state: dict[str, torch.Tensor], run: Path, step: int, world: World, *, keep: int) -> Committed:
    """Write and commit a checkpoint, then drop all but the newest `keep`.

    Raises:
        TrainingError: there is no room, or the disk fails; the checkpoints committed before are untouched.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    with _disk_errors_told(path, step, world):
        if world.first:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before it committed
            path.mkdir(parents=True)
        world.gather(None)  # nobody writes before the directory is there
        dcp_save(state, storage_writer=FileSystemWriter(path, sync_files=True), process_group=None)
        # Each process reads back what it wrote; the digests then describe what is on the disk.
        mine = {file.name: _fingerprint(file) for file in path.glob(f"__{world.rank}_*.distcp")}
        everyone = world.gather(mine)
        if world.first:
            files = {".metadata": _fingerprint(path / ".metadata")}
            for part in everyone:
                assert isinstance(part, dict)
                files.update(part)
            write_atomically(path / MARKER, json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
            _sync_directory(path)
            _sync_directory(path.parent)
            _prune(run, keep)
        world.gather(None)
    return Committed(path, step)


def committed(run: Path) -> list[Committed]:
    """The committed checkpoints of a run, oldest first."""
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name and (path / MARKER).is_file():
            found.append(Committed(path, int(name[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def load(checkpoint: Committed, state: dict[str, torch.Tensor], world: World | None = None) -> None:
    """Verify a checkpoint and fill the tensors of `state` from it, at any number of processes.

    Args:
        state: as `training_state` gives it; may leave out what is not wanted, such as the optimizer's part.
        world: the processes that load together; None loads in this process alone.

    Raises:
        TrainingError: a file is missing, cut short or altered, or the tensors are those of another model.
    """
    _verify(checkpoint)
    reader = _Reader(checkpoint)
    metadata = reader.read_metadata()
    _check_tensors(checkpoint, metadata, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        dcp_load(state, storage_reader=reader, no_dist=world is None)


def _verify(checkpoint: Committed) -> None:
    """Every file that the marker names is there and holds what was written."""
    mend = _mend(checkpoint)
    try:
        marker = json.loads((checkpoint.path / MARKER).read_text(encoding="utf-8"))
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        if marker["format"] != FORMAT or marker["step"] != checkpoint.step or ".metadata" not in files:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TrainingError(f"{checkpoint.path / MARKER} is not one that this version wrote; {mend}") from None
    for name, (size, digest) in files.items():
        file = checkpoint.path / name
        if not file.is_file():
            raise TrainingError(f"the checkpoint {checkpoint.path} lacks its file {name}; {mend}")
        if file.stat().st_size != size:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is damaged: {name} has {file.stat().st_size} bytes where {size} "
                f"were written; {mend}"
            )
        if _fingerprint(file)[1] != digest:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is damaged: {name} is not what was written (SHA-256 differs); {mend}"
            )


def _mend(checkpoint: Committed) -> str:
    run = checkpoint.path.parent.parent
    others = [other for other in committed(run) if other.step != checkpoint.step]
    if others:
        return f"remove {checkpoint.path} to go on from the checkpoint of step {others[-1].step}"
    return "it is the only one of this run: restore it from a copy, or start anew in another run directory"


def _check_tensors(checkpoint: Committed, metadata: Metadata, state: dict[str, torch.Tensor]) -> None:
    """Raise unless the checkpoint holds every tensor of `state` in its shape."""
    mend = "name a run of this recipe, or start anew in another run directory"
    for name, tensor in state.items():
        entry = metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise TrainingError(f"the checkpoint {checkpoint.path} is of another model: it holds no {name}; {mend}")
        if entry.size != tensor.shape:
            raise TrainingError(
                f"the checkpoint {checkpoint.path} is of another model: {name} has shape {tuple(entry.size)} there and "
                f"{tuple(tensor.shape)} here; {mend}"
            )


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, digest


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable, as fsync makes the contents of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run: Path, keep: int) -> None:
    for checkpoint in committed(run)[:-keep]:
        # The marker goes first: what is left if this is interrupted does not count. One that cannot be removed stays.
        with contextlib.suppress(OSError):
            (checkpoint.path / MARKER).unlink()
            shutil.rmtree(checkpoint.path, ignore_errors=True)


@contextmanager
def _disk_errors_told(path: Path, step: int, world: World) -> Iterator[None]:
    """Turn what a full or failing disk raises into one sentence; what was half written is removed."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        if world.first and not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)
        kept = committed(path.parent.parent)
        rest = f"the checkpoint of step {kept[-1].step} is untouched" if kept else "no earlier one was written"
        what = "no space is left on the disk" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else str(cause)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {path.parent}: {what}; {rest}: "
            "make room and give the same command again"
        ) from None


def _disk_error(error: BaseException) -> OSError | None:
    """The OSError behind what DCP raised, if that is what it was."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, CheckpointException):
        for inner, _ in error.failures.values():
            found = _disk_error(inner)
            if found is not None:
                return found
    return None


class _Reader(FileSystemReader):
    """DCP's reader, but for the metadata, which it would unpickle whatever they hold."""

    def __init__(self, checkpoint: Committed) -> None:
        super().__init__(checkpoint.path)
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata, built from known classes alone."""
        with (self._checkpoint.path / ".metadata").open("rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except (
                pickle.UnpicklingError,
                AttributeError,
                EOFError,
                IndexError,
                KeyError,
                TypeError,
                ValueError,
            ) as error:
                raise TrainingError(
                    f"{self._checkpoint.path / '.metadata'} was not written by Tilewright ({error}); "
                    f"{_mend(self._checkpoint)}"
                ) from None
        if not isinstance(metadata, Metadata):
            raise TrainingError(
                f"{self._checkpoint.path / '.metadata'} holds no checkpoint metadata; {_mend(self._checkpoint)}"
            )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors in files, and nothing that could run code."""

    _KNOWN: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"Path", "PosixPath", "WindowsPath"},
        "pathlib._local": {"Path", "PosixPath", "WindowsPath"},  # their home in Python 3.13
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those known.

        Raises:
            pickle.UnpicklingError: it is not.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint")
