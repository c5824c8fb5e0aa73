"""The record of a run: `metrics.jsonl`, one JSON object a line, and the same figures as TensorBoard events.

A training line holds exactly the fields of `TrainingLine`; an evaluation line holds `step` and
`eval: {NAME: {loss, perplexity, bits_per_byte, tokens}}`. A value that is not finite is written as null, which every
JSON reader takes. Each step stands once, however often the run was killed and resumed; what it recorded of steps that
it went back on is in `metrics-rolled-back.jsonl`.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.run_directory import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS = "metrics.jsonl"
ROLLED_BACK = "metrics-rolled-back.jsonl"
_Send = Callable[[Mapping[str, float], int], None]


class TrainingLine(TypedDict):
    """What one step recorded.

    Attributes:
        step: optimizer steps done, this one included.
        loss: mean cross-entropy of the step's tokens, in nats.
        lr: the learning rate that the step used.
        grad_norm: global 2-norm of the gradient before clipping.
        tokens: read for training so far, over all processes and restarts; those of steps that were skipped or that the
            run went back on are among them.
        sample: the first of the step's samples, see `tilewright.corpus`.
        sequences: how many samples the step took, from that one on.
        sequence_length: of the pieces, in tokens, that these were cut into.
        tokens_per_second: over all processes.
        tokens_per_second_since_start: `tokens` over the wall-clock time since the run first began, everything counted
            (see `WallClock.rate`); None where that is not known.
        mfu: model FLOPs utilisation as a fraction of 1; None where no peak is known.
        hfu: hardware FLOPs utilisation: as `mfu`, with what activation checkpointing computes again (arXiv:2205.05198;
            see `recomputed_flops_per_token`); None where that is not known.
        peak_memory_bytes: the most memory in use at once so far.
        memory: bytes by kind in the process that records, see `StepMemory`; None for what is not known.
        data_wait: fraction of the step's time that the process which records waited for its batches.
        checkpoint_in_flight: whether a checkpoint was being written when the step began.
        grad_norms: the same by block, and by module where in none.
        seconds: what parts of the step took in the process that records: ``data`` (waiting), ``forward``, ``backward``
            ``reduce`` (of gradients, where nothing overlaps it; where there are processes to reduce over),
            ``optimizer``, and ``checkpoint``, the last one's, where one came between this step and the one before.
        skipped: whether the weights stayed as they were: the gradient was not finite, or the loss a spike.
        profiled: whether the step was slowed down by the profiler; it says nothing of the speed of the others.
        slowest_rank: every 32nd step, the process that the others waited for most, see
            `tilewright.trainer.parallel.waiting`; else None.
        slowest_behind: for how much of a step they did, as a fraction of 1.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    sample: int
    sequences: int
    sequence_length: int
    tokens_per_second: float
    tokens_per_second_since_start: float | None
    mfu: float | None
    hfu: float | None
    peak_memory_bytes: int
    memory: dict[str, int | None]
    data_wait: float
    checkpoint_in_flight: bool
    grad_norms: dict[str, float]
    seconds: dict[str, float]
    skipped: bool
    profiled: bool
    slowest_rank: int | None
    slowest_behind: float | None


class Metrics:
    """Owns `metrics.jsonl` and `tensorboard/` of a run directory; one process of the run opens it.

    Each line is flushed as it is written.

    Args:
        run_directory: exists.
        resume_step: the step of the checkpoint that the run goes on from, 0 for a new run. Lines of later steps,
            written by a process that died after that checkpoint, are dropped, and so is a line that its death tore.
        send: is given all scalars of a step, under TensorBoard's names, and the step.

    Raises:
        TrainingError: here and in every method, a file cannot be written: the disk is full, say.
    """

    def __init__(self, run_directory: Path, *, resume_step: int, send: _Send | None = None) -> None:
        self._path, self._send = run_directory / METRICS, send
        with _explained(run_directory):
            if self._path.exists():
                _keep_lines(self._path, lambda line: line["step"] <= resume_step)
            self._evaluated = {_text_of(line) for line in _lines(self._path) if "eval" in line}
            self._file = self._path.open("a", encoding="utf-8")
            self._events = _open_events(run_directory / "tensorboard", resume_step)

    def train(self, **fields: Unpack[TrainingLine]) -> None:
        """Record a training step."""
        line = {name: fields[name] for name in TrainingLine.__annotations__}  # type: ignore[literal-required]
        self._write(line)
        scalars: dict[str, Any] = {}
        for name, value in line.items():
            parts = {f"{name}/{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value}
            scalars |= {f"train/{part}": x for part, x in parts.items() if part != "step"}
        self._scalars(scalars, fields["step"])

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Record an evaluation, in place of an earlier one of the same step over the same text.

        Args:
            step: optimizer steps done.
            results: for each evaluated set its loss (nats per token), perplexity, bits_per_byte and tokens.
        """
        line = {"step": step, "eval": {name: dict(result) for name, result in results.items()}}
        if (text := _text_of(line)) in self._evaluated:
            # A run that died between this evaluation and its checkpoint evaluates again when it resumes.
            with _explained(self._path):
                self._file.close()
                _keep_lines(self._path, lambda line: "eval" not in line or _text_of(line) != text)
                self._file = self._path.open("a", encoding="utf-8")
        self._evaluated.add(text)
        self._write(line)
        values = {f"eval/{name}/{key}": value for name, result in results.items() for key, value in result.items()}
        self._scalars(values, step)
        with _explained(self._path.parent):
            self._events.flush()

    def has_evaluation(self, step: int) -> bool:
        """Whether one is recorded of this step."""
        return any(evaluated == step for evaluated, *_ in self._evaluated)

    def roll_back(self, step: int) -> None:
        """The run goes on from `step` again: lines of later steps move to ``metrics-rolled-back.jsonl``."""
        with _explained(self._path.parent):
            self._file.close()
            self._events.close()
            with self._path.with_name(ROLLED_BACK).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in _lines(self._path) if line["step"] > step)
            _keep_lines(self._path, lambda line: line["step"] <= step)
            self._evaluated = {text for text in self._evaluated if text[0] <= step}
            self._file = self._path.open("a", encoding="utf-8")
            self._events = _open_events(self._path.parent / "tensorboard", step)

    def close(self) -> None:
        """Finish both records; nothing can be recorded afterwards. A second close does nothing."""
        with _explained(self._path.parent):
            self._file.close()
            self._events.close()

    def _write(self, line: dict[str, Any]) -> None:
        with _explained(self._path):
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        with _explained(self._path.parent):
            for name, value in finite.items():
                self._events.add_scalar(name, value, step)
        if self._send is not None:
            self._send(finite, step)


def read_metrics(
    path: Path, *, lighten: Callable[[dict[str, Any]], None] = lambda line: None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training lines and the evaluation lines of a `metrics.jsonl`, of a run that may still be going on.

    Args:
        lighten: takes out of each training line, as it is read, what is not to be held for all steps at once.

    Raises:
        TrainingError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise TrainingError(f"there is no {path}; name a run directory in which a training run has recorded a step")
    training, evaluations = [], []
    with _explained(path, "read"):
        for line in _lines(path):
            if "eval" in line:
                evaluations.append(line)
            else:
                lighten(line)
                training.append(line)
    return training, evaluations


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in _lines(path) if wanted(line))
    if text.encode() != path.read_bytes():
        write_atomically(path, text)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the file; a killed process or a crashed machine leaves torn ones, which hold no step."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if text.endswith("\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def _text_of(line: Mapping[str, Any]) -> tuple[int, float | None]:
    """What tells an evaluation from others: its step, and over how many tokens it was."""
    first: Mapping[str, float] = next(iter(line["eval"].values()), {})
    return line["step"], first.get("tokens")


def _finite(value: Any) -> Any:
    """The value with null for every float that JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_events(folder: Path, resume_step: int) -> SummaryWriter:
    # Imported here because it takes longer than all the rest, and only the process that records needs it.
    from torch.utils.tensorboard.writer import SummaryWriter

    # TensorBoard hides earlier events from `purge_step` on.
    goes_on = folder.exists() and any(folder.iterdir())
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if goes_on else None)


@contextmanager
def _explained(path: Path, what: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space there, then resume the run" if full else "mend that, then start the command again"
        raise TrainingError(f"could not {what} {path}: {error.strerror or error}; {mend}") from error
