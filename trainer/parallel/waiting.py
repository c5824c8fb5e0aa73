"""How long a process waits for the others, and which one they wait for.

In a synchronous step all processes come to the end together, however slow one of them is: its slowness shows in the
others, which stand in collectives until it has come. So each adds up the time that it spends there. The transfer itself
takes all of them equally long; the one that waits least is the one that the others wait for:

    behind = (median of the others' waiting − its own waiting) ÷ the step's time

Each is the median over a window of steps. On a GPU the collectives are timed where they run, by events on their stream.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

WINDOW = 32
_Mark = float | torch.cuda.Event
_spans: deque[tuple[_Mark, _Mark]] = deque(maxlen=100_000)  # nobody may ask, as where a run is only scored
_reductions: deque[tuple[_Mark, _Mark]] = deque(maxlen=100_000)  # those of gradients


class Slowest(TypedDict):
    """Fields of a `TrainingLine`, which describes them."""

    slowest_rank: int | None
    slowest_behind: float | None


class SlowRanks:
    """Finds the processes that the others wait for; made and called alike by each of them.

    Args:
        model: sharded; its collectives are timed from now on.
        shards: processes that share the shards of one model, which have neighbouring ranks and wait for each other in
            every block; those of other replicas wait for them once a step, untimed.
        share: of a step, above which a process is named; 0: none is looked for.
        gather: what each process gives, in the order of ranks, on all of them.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shards: int,
        share: float,
        gather: Callable[[object], list[object]],
        tell: Callable[[str], None],
    ) -> None:
        self._shards, self._share, self._gather, self._tell = shards, share, gather, tell
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._named: list[int] = []
        self._on = shards > 1 and share > 0
        _spans.clear()
        if shards > 1:
            time_collectives(model)

    def begin_step(self) -> None:
        """Forget the collectives between two steps, such as an evaluation's."""
        _spans.clear()

    def of_step(self, seconds: float) -> Slowest:
        """What there is to record of the step that has ended; names those that newly hold the others up.

        Every `WINDOW` steps the processes compare; between, there is nothing to record.

        Args:
            seconds: that the step took.
        """
        waited = waited_seconds()
        if not self._on:
            return {"slowest_rank": None, "slowest_behind": None}
        self._steps.append((waited, seconds))
        if len(self._steps) < WINDOW:
            return {"slowest_rank": None, "slowest_behind": None}
        waits, steps = zip(*self._steps, strict=True)
        self._steps.clear()
        mine = (statistics.median(waits), statistics.median(steps), socket.gethostname())
        told = cast("list[tuple[float, float, str]]", self._gather(mine))
        behind = shares_behind([wait for wait, *_ in told], [step for _, step, _ in told], self._shards)
        slow = [rank for rank, share in enumerate(behind) if share > self._share]
        for rank in sorted(set(slow) - set(self._named)):
            self._tell(
                f"process {rank} on {told[rank][2]} is slower than the rest: they wait for it {behind[rank]:.0%} of a "
                f"step (median of the last {WINDOW} steps)"
            )
        self._named = slow
        slowest = max(range(len(behind)), key=behind.__getitem__)
        return {"slowest_rank": slowest, "slowest_behind": behind[slowest]}


def shares_behind(waits: Sequence[float], steps: Sequence[float], shards: int) -> list[float]:
    """The share of a step that the others of its shards wait for each process, negative for one that waits itself.

    Args:
        waits: seconds of each process.
        steps: seconds that its steps took.
        shards: processes in a row that wait for each other; at least 2.
    """
    behind = []
    for rank, wait in enumerate(waits):
        first = rank // shards * shards
        others = [waits[other] for other in range(first, first + shards) if other != rank]
        behind.append((statistics.median(others) - wait) / steps[rank])
    return behind


def time_collectives(model: nn.Module) -> None:
    """Have the gathers and reductions of a sharded model timed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_TimedAllGather())  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(_TimedReduceScatter())  # type: ignore[arg-type]
            if next(module.parameters()).device.type == "cpu":
                module.set_all_reduce_hook(_lengthen_reduction)


def reduction_marks(backward: str, reduce: str) -> list[tuple[str, _Mark]]:
    """For a `PhaseClock`: where the reductions of the backward pass that has ended began, and where it went on.

    On a GPU reductions run beside the backward pass; what counts is the rest from the beginning of the last one, which
    waits for the last gradient, so that nothing runs beside it any more.
    """
    if not _reductions:
        return []
    (last, _), marks = _reductions[-1], list[tuple[str, _Mark]]()
    if isinstance(last, float):
        for start, end in _reductions:
            marks += [(reduce, start), (backward, end)]
    else:
        marks = [(reduce, last)]
    _reductions.clear()
    return marks


def _lengthen_reduction(_: torch.Tensor) -> None:
    """The last reduction goes on to here: over the replicas, where there are any."""
    if _reductions:
        _reductions[-1] = (_reductions[-1][0], time.perf_counter())


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """The ``with`` block is a collective, in which this process may wait for others."""
    start = _mark(device)
    yield
    _spans.append((start, _mark(device)))


def waited_seconds() -> float:
    """The time in collectives since this was asked last; on a GPU the device has come past all of them."""
    total = 0.0
    for start, end in _spans:
        if isinstance(start, float):
            total += cast(float, end) - start
        else:
            total += start.elapsed_time(cast(torch.cuda.Event, end)) / 1e3
    _spans.clear()
    return total


def _mark(device: torch.device) -> _Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _Allocated:
    """Buffers as FSDP itself makes them."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)


class _TimedAllGather(_Allocated):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        with waiting(input_tensor.device):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _TimedReduceScatter(_Allocated):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any,
        async_op: bool = False,
    ) -> Any:  # fmt: skip
        with waiting(input_tensor.device):
            work = dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        _reductions.append(_spans[-1])
        return work
