"""Reading a checkpoint: every byte is verified first, the processes sharing that work, and no code from it is run.

What is there the first process says for all: storage that several machines share may show them different things, and
processes that went by different lists would wait for one another for ever.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from tilewright.trainer.checkpoints.files import METADATA, Committed, Fingerprint, committed_in, marked_files
from tilewright.trainer.checkpoints.storage import Files, size_of
from tilewright.trainer.errors import TrainingError, disk_error_text
from tilewright.trainer.health.hang import alive
from tilewright.trainer.parallel.sharding import World

_T = TypeVar("_T")


def seen_by_the_first(look: Callable[[], _T], world: World | None) -> _T:
    """What `look` finds on the first process, on all of them.

    Raises:
        TrainingError: on all of them, what it raised, or that the storage could not be read.
    """
    if world is not None:
        return world.first_decides(look)
    try:
        return look()
    except OSError as error:
        raise TrainingError(disk_error_text(error)) from None


def load(
    checkpoint: Committed,
    state: dict[str, torch.Tensor],
    world: World | None = None,
    *,
    optional: tuple[str, ...] = (),
) -> set[str]:
    """Verify a checkpoint and fill the tensors of `state` from it, at any number of processes.

    Args:
        state: as `training_state` gives it; may leave out what is not wanted, such as the optimizer's part.
        world: the processes that load together, of which each verifies its share of the files; None loads in this
            process alone.
        optional: what the names of tensors begin with that a checkpoint may lack, being older than what needs them.

    Returns:
        The names of those that it lacks, which stay as they are.

    Raises:
        TrainingError: a file is missing, cut short or altered, the storage cannot be read, or the tensors are those of
            another model; the same on every process.
    """
    try:
        files = _verified(checkpoint, world)
        metadata = _metadata(checkpoint, seen_by_the_first(lambda: _content(checkpoint), world), files)
    except ValueError as damage:
        raise TrainingError(f"{damage}; {_mend(checkpoint, world)}") from None
    there = metadata.state_dict_metadata
    missing = {name for name in state if name.startswith(optional) and name not in there}
    wanted = {name: tensor for name, tensor in state.items() if name not in missing}
    _check_tensors(checkpoint, metadata, wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        try:
            dcp_load(wanted, storage_reader=_Reader(checkpoint, metadata), no_dist=world is None)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise TrainingError(
                f"the checkpoint {checkpoint.path} was intact, and then process {rank} could not read it: {cause}; "
                "give the same command again"
            ) from None
    return missing


def find_damage(checkpoint: Committed, world: World | None = None) -> str | None:
    """The first file of a checkpoint that is not what was written, in words; None where all of them are.

    Args:
        world: processes that all call this, and deal the files out among themselves.

    Raises:
        TrainingError: on all of them, a file cannot be read, which says nothing of what it holds.
    """
    try:
        _verified(checkpoint, world)
    except ValueError as damage:
        return str(damage)
    return None


def _verified(checkpoint: Committed, world: World | None) -> set[str]:
    """The names of a checkpoint's files, each of which is what was written.

    Raises:
        ValueError: one is not; see `find_damage`, also for the TrainingError.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)

    def marked() -> list[tuple[str, Fingerprint]] | str:
        try:
            return sorted(marked_files(checkpoint).items())
        except ValueError as error:
            return str(error)

    files = seen_by_the_first(marked, world)
    if isinstance(files, str):
        raise ValueError(files)
    damage, unread = None, None
    try:
        damage = next(filter(None, (_damage(checkpoint, *files[i]) for i in range(rank, len(files), size))), None)
    except TrainingError as error:  # raised once all have heard of it, for the others wait to hear from this process
        unread = str(error)
    told = cast(list[tuple[str | None, str | None]], world.gather((damage, unread)) if world else [(damage, unread)])
    for damage, _ in told:
        if damage is not None:
            raise ValueError(damage)
    for _, unread in told:
        if unread is not None:
            raise TrainingError(unread)
    return {name for name, _ in files}


def _damage(checkpoint: Committed, name: str, written: Fingerprint) -> str | None:
    """What is wrong with a file, in words; None where it is what was written.

    Raises:
        TrainingError: it cannot be read.
    """
    file = checkpoint.path / name
    alive()
    try:
        # The size first: it spares the reading of a file that was cut short.
        size = size_of(file)
        found = Fingerprint.of(file) if size == written.size else None
    except FileNotFoundError:
        return f"the checkpoint {checkpoint.path} lacks its file {name}"
    except OSError as error:
        raise TrainingError(
            f"the checkpoint {checkpoint.path} cannot be read: {name}: {error.strerror or error}; mend that, then give "
            "the same command again"
        ) from None
    if found is None:
        return f"the checkpoint {checkpoint.path} is damaged: {name} has {size} bytes where {written.size} were written"
    if found != written:
        return f"the checkpoint {checkpoint.path} is damaged: {name} is not what was written (SHA-256 differs)"
    return None


def _mend(damaged: Committed, world: World | None) -> str:
    """What to do instead: go on from the newest other checkpoint that is intact, which is found by verifying it."""
    in_the_way = [damaged.path]
    there = seen_by_the_first(lambda: committed_in(damaged.path.parent), world)
    others = [other for other in there if other.step != damaged.step]
    for other in reversed(others):
        if find_damage(other, world) is None:
            paths = " and ".join(map(str, in_the_way))
            return f"remove {paths} to go on from the checkpoint of step {other.step}, which is intact"
        in_the_way.append(other.path)
    which = "none of this run's other checkpoints is intact" if others else "it is the only one of this run"
    return f"{which}: restore it from a copy, or start anew in another run directory"


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


def _content(checkpoint: Committed) -> bytes:
    """The checkpoint's metadata as they are stored."""
    with (checkpoint.path / METADATA).open("rb") as file:
        return file.read()


def _metadata(checkpoint: Committed, content: bytes, files: set[str]) -> Metadata:
    """The checkpoint's metadata, built from known classes alone.

    Args:
        files: those that were verified, which alone may be read.

    Raises:
        ValueError: they name another class or another file, or are no metadata.
    """
    path = checkpoint.path / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by Tilewright ({error})") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds no checkpoint metadata")
    stored = metadata.storage_data
    named = {getattr(part, "relative_path", None) for part in (stored.values() if isinstance(stored, dict) else ())}
    for name in named - files:
        raise ValueError(f"{path} names the file {name}, which is none of this checkpoint's")
    return metadata


class _Reader(FileSystemReader):
    """DCP's reader, given metadata that were read with care: DCP would unpickle them whatever they hold."""

    def __init__(self, checkpoint: Committed, metadata: Metadata) -> None:
        super().__init__("")
        self.fs = Files()  # type: ignore[assignment]
        self.path = checkpoint.path  # type: ignore[assignment]
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given."""
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


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
