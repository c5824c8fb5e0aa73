"""Writing checkpoints while training goes on: a copy on the host, a thread that writes it, the marker last.

    writer.save(state, step)    main thread: wait for the save before, copy the tensors, go on
                                background, on every process: directory → own file, its fingerprint taken on the way
                                then the first process alone: marker → drop what is superseded

The threads of the processes meet in a process group of their own: collectives of one group must come in the same order
everywhere, and nobody knows between which of the training's these fall.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult

from tilewright.trainer.checkpoints.files import (
    MARKER,
    Committed,
    Fingerprint,
    HeldOut,
    checkpoint_folder,
    checkpoint_of,
    commit,
    committed_in,
    discard,
    recorded_heldout,
    uncommitted_in,
)
from tilewright.trainer.checkpoints.storage import Files, Location, remove_folder, size_of
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.health.hang import alive
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe import Checkpoints

_T = TypeVar("_T")
# How often a process that waits for the others' parts of a checkpoint says that it is alive.
_ALIVE_SECONDS = 1.0


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; every process of the run makes one, and calls it alike.

    Asynchronous saves hold a copy of what they save in host memory until it is written: with float32 weights and
    AdamW's averages in bfloat16, 8 bytes × parameters ÷ the processes that the parameters are sharded over, for each
    process of a machine.

    As a context manager it lets no save go unfinished, however the ``with`` block ends.

    Args:
        run: the run directory.
        world: its processes.
        options: what is kept, and whether training goes on meanwhile.
    """

    def __init__(self, run: Path, world: World, options: Checkpoints) -> None:
        self._world, self._options = world, options
        self._folder = checkpoint_folder(run, options.folder)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_use_device, initargs=(world.device,))
        self._save: Future[None] | None = None
        self._at_work = False  # on this process's own part of a checkpoint, rather than waiting for the others

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._save is not None and not self._save.done()

    @property
    def failed(self) -> bool:
        """Whether the last save ended in an error, which `wait` raises; all processes end in it, not all at once."""
        return self._save is not None and self._save.done() and self._save.exception() is not None

    def save(self, state: dict[str, torch.Tensor], step: int, *, heldout: HeldOut | None = None) -> None:
        """Take a checkpoint of `state` as it is now; with asynchronous saves it is committed some time later.

        Args:
            state: as `training_state` gives it; may be changed as soon as this returns.
            heldout: of this step's evaluation, where there was one.

        Raises:
            TrainingError: there is no room, or the disk fails, for this checkpoint or the one before; what was
                committed is untouched.
        """
        self.wait()
        asynchronous = self._options.asynchronous
        self._save = self._thread.submit(self._write, staged(state) if asynchronous else state, step, heldout)
        if not asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight any more.

        A process that hangs in its own part of it is the hang watch's; one that waits for the others' parts is alive,
        for as long as they may take: each of them is watched where it is.

        Raises:
            TrainingError: the one that was has failed; see `save`.
        """
        save, self._save = self._save, None
        if save is not None:
            while not concurrent.futures.wait([save], timeout=_ALIVE_SECONDS).done:
                if not self._at_work:
                    alive()
            save.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except (TrainingError, RuntimeError):
            if kind is None:  # else what ended the block is told, not what came of it
                raise
        finally:
            self._thread.shutdown()

    def _write(self, state: dict[str, torch.Tensor], step: int, heldout: HeldOut | None) -> None:
        checkpoint = checkpoint_of(self._folder, step)
        writer = _Writer(checkpoint.path, self._own_part)
        try:
            self._together(lambda: self._make_room(checkpoint))
            dcp_save(state, storage_writer=writer, process_group=self._group)
            written = self._together(lambda: self._stored(checkpoint, writer.written))
            files = {name: fingerprint for part in written for name, fingerprint in part.items()}
            self._together(lambda: self._commit(checkpoint, files, heldout))
        except (OSError, CheckpointException) as error:
            cause = _disk_error(error)
            if cause is None:
                raise
            raise TrainingError(self._what_failed(checkpoint, cause)) from None

    def _make_room(self, checkpoint: Committed) -> None:
        if self._world.first:
            discard(checkpoint.path)  # of a run that was killed before it committed, or went back
            checkpoint.path.mkdir(parents=True)

    def _stored(self, checkpoint: Committed, written: dict[str, Fingerprint]) -> dict[str, Fingerprint]:
        """`written`, the files of this process, once the storage has each in its full length.

        Raises:
            OSError: it has not.
        """
        for name, fingerprint in written.items():
            size = size_of(checkpoint.path / name)
            if size != fingerprint.size:
                raise OSError(f"{name} has {size} bytes there where {fingerprint.size} were written")
        return written

    def _commit(self, checkpoint: Committed, files: dict[str, Fingerprint], heldout: HeldOut | None) -> None:
        if not self._world.first:
            return
        commit(checkpoint, files, heldout)
        with contextlib.suppress(OSError):  # it counts; what is in the way is removed after the next one
            old = [other.path for other in superseded(committed_in(self._folder), self._options)]
            for path in [*old, *uncommitted_in(self._folder)]:
                alive()
                with contextlib.suppress(OSError):
                    discard(path)

    def _what_failed(self, checkpoint: Committed, cause: OSError) -> str:
        """One sentence for what a full or failing disk raised; what was half written is removed."""
        rest = "the earlier ones are as they were"
        with contextlib.suppress(OSError):  # a storage that fails may not answer this either
            if self._world.first and not (checkpoint.path / MARKER).is_file():
                remove_folder(checkpoint.path)
            kept = [other for other in committed_in(self._folder) if other != checkpoint]
            rest = f"the checkpoint of step {kept[-1].step} is untouched" if kept else "no earlier one was written"
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        what, mend = ("no space is left on the disk", "make room") if full else (str(cause), "mend that")
        return (
            f"the checkpoint of step {checkpoint.step} could not be written to {self._folder}: {what}; "
            f"{rest}: {mend} and give the same command again"
        )

    @contextlib.contextmanager
    def _own_part(self) -> Iterator[None]:
        """Within the block the thread works on this process's part of a checkpoint."""
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False

    def _together(self, work: Callable[[], _T]) -> list[_T]:
        """What `work` gives on each process, in the order of ranks; its OSError on any of them is raised on all."""
        outcome: tuple[_T | None, OSError | None]
        try:
            with self._own_part():
                outcome = (work(), None)
        except OSError as error:
            outcome = (None, error)
        outcomes = [outcome] * self._world.size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]  # type: ignore[misc]


def staged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of the tensors in host memory, sharded as they are, complete when this returns."""
    on_gpu = torch.cuda.is_available()
    # A copy that the GPU need not be waited for lands in pinned memory, several times as fast, and is waited for once.
    copies = {name: tensor.detach().to("cpu", copy=True, non_blocking=on_gpu) for name, tensor in state.items()}
    if on_gpu:
        torch.cuda.synchronize()
    return copies


def _use_device(device: torch.device) -> None:
    """Have this thread use the GPU of its process, for a new one uses the first of the machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def superseded(checkpoints: Sequence[Committed], options: Checkpoints) -> list[Committed]:
    """Those of a run's checkpoints, oldest first, that are neither among the newest, nor an n-th, nor the best.

    Losses over different text do not compare: where what is scored has changed, the best over each is kept.
    """
    kept = {checkpoint.step for checkpoint in checkpoints[-options.keep :]}
    if options.keep_every:
        kept |= {checkpoint.step for checkpoint in checkpoints if checkpoint.step % options.keep_every == 0}
    if options.keep_best:
        best: dict[int | None, tuple[float, int]] = {}
        for checkpoint in checkpoints:
            if (heldout := recorded_heldout(checkpoint)) is not None:
                scored = (heldout.loss, checkpoint.step)
                best[heldout.tokens] = min(scored, best.get(heldout.tokens, scored))
        kept |= {step for _, step in best.values()}
    return [checkpoint for checkpoint in checkpoints if checkpoint.step not in kept]


class _Writer(FileSystemWriter):
    """DCP's writer to any storage, which takes the fingerprints of the files and says so when the disk was full."""

    def __init__(self, path: Location, own_part: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        # A remote file is stored when it is closed; DCP would sync every disk of the machine for it.
        super().__init__("", sync_files=isinstance(path, Path))
        self._files, self._own_part = _FingerprintedFiles(), own_part
        self.fs, self.path = self._files, path  # type: ignore[assignment]

    @property
    def written(self) -> dict[str, Fingerprint]:
        """The files that this process has written, by name."""
        return {name: file.fingerprint() for name, file in self._files.written.items()}

    @property
    def checkpoint_id(self) -> str:
        """Where it is, for the metadata."""
        return str(self.path)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write what is this process's to write."""
        with self._own_part():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, on the first process."""
        with self._own_part():
            super().finish(metadata, results)


class _FingerprintedFiles(Files):
    """DCP's file system, but for what a failed write raises, and what it knows of the files written.

    `torch.save` loses the OSError of a stream that it writes to and raises a RuntimeError about positions in its place.
    """

    def __init__(self) -> None:
        self.written: dict[str, _FingerprintedFile] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """A file, opened in `mode`; within the block its own OSError goes before what came of it.

        Raises:
            OSError: see `open`, and for what is written in the block.
        """
        with super().create_stream(path, mode) as stream:
            file = self.written[path.name] = _FingerprintedFile(stream)
            try:
                yield cast(io.IOBase, file)
            except RuntimeError:
                if file.error is not None:
                    raise file.error from None
                raise

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file."""
        super().rename(path, new_path)
        self.written[new_path.name] = self.written.pop(path.name)


class _FingerprintedFile:
    """A file that is written to from its beginning to its end, and the error of a write."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        alive()
        self._hash.update(data)
        try:
            self._file.write(data)  # all of it; what this returns differs between file systems
        except OSError as error:
            self.error = error
            raise
        size = memoryview(data).nbytes
        self._size += size
        return size

    def fingerprint(self) -> Fingerprint:
        """Of what was written: of what was meant, whatever became of it on the way to the disk."""
        return Fingerprint(self._size, self._hash.hexdigest())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
