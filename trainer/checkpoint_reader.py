"""Reading a checkpoint: every byte is verified first, the processes sharing that work, and no code from it is run."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from tilewright.trainer.checkpoint_files import METADATA, Committed, Fingerprint, committed, marked_files
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.parallel import World


def load(checkpoint: Committed, state: dict[str, torch.Tensor], world: World | None = None) -> None:
    """Verify a checkpoint and fill the tensors of `state` from it, at any number of processes.

    Args:
        state: as `training_state` gives it; may leave out what is not wanted, such as the optimizer's part.
        world: the processes that load together, of which each verifies its share of the files; None loads in this
            process alone.

    Raises:
        TrainingError: a file is missing, cut short or altered, or the tensors are those of another model; the same on
            every process.
    """
    problem = find_damage(checkpoint, world)
    if problem is None:
        try:
            metadata = _read_metadata(checkpoint)
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        raise TrainingError(f"{problem}; {_mend(checkpoint, world)}")
    _check_tensors(checkpoint, metadata, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        dcp_load(state, storage_reader=_Reader(checkpoint, metadata), no_dist=world is None)


def find_damage(checkpoint: Committed, world: World | None = None) -> str | None:
    """The first file of a checkpoint that is not what was written, in words; None where all of them are.

    Args:
        world: processes that all call this, and deal the files out among themselves.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    try:
        files = sorted(marked_files(checkpoint).items())
    except ValueError as error:
        files, mine = [], str(error)
    else:
        mine = next(filter(None, (_damage(checkpoint, *files[i]) for i in range(rank, len(files), size))), "")
    told = world.gather(mine) if world else [mine]
    return next((str(problem) for problem in told if problem), None)


def _damage(checkpoint: Committed, name: str, written: Fingerprint) -> str | None:
    file = checkpoint.path / name
    try:
        # The size first: it spares the reading of a file that was cut short.
        size = file.stat().st_size
        found = Fingerprint.of(file) if size == written.size else None
    except FileNotFoundError:
        return f"the checkpoint {checkpoint.path} lacks its file {name}"
    except OSError as error:
        return f"the checkpoint {checkpoint.path} cannot be read: {name}: {error.strerror or error}"
    if found is None:
        return f"the checkpoint {checkpoint.path} is damaged: {name} has {size} bytes where {written.size} were written"
    if found != written:
        return f"the checkpoint {checkpoint.path} is damaged: {name} is not what was written (SHA-256 differs)"
    return None


def _mend(damaged: Committed, world: World | None) -> str:
    """What to do instead: go on from the newest other checkpoint that is intact, which is found by verifying it."""
    in_the_way = [damaged.path]
    others = [other for other in committed(damaged.path.parent.parent) if other.step != damaged.step]
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


def _read_metadata(checkpoint: Committed) -> Metadata:
    """The checkpoint's metadata, built from known classes alone.

    Raises:
        ValueError: they name another class, or are no metadata.
    """
    path = checkpoint.path / METADATA
    with path.open("rb") as file:
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
            raise ValueError(f"{path} was not written by Tilewright ({error})") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds no checkpoint metadata")
    return metadata


class _Reader(FileSystemReader):
    """DCP's reader, given metadata that were read with care: DCP would unpickle them whatever they hold."""

    def __init__(self, checkpoint: Committed, metadata: Metadata) -> None:
        super().__init__(checkpoint.path)
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
