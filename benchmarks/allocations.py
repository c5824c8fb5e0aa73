"""The most memory that calls have in use at once, counted from allocations, temporaries included.

On a CPU PyTorch's allocator reports each block that it hands out or takes back to PyTorch's profiler, also those that
an operation needs for itself alone. Memory past that allocator is not seen: what oneDNN and MKL keep for themselves,
NumPy's arrays, Python's objects.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler import profile, record_function

_PHASE = "tilewright phase "


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes in use at once, at most, during the call, above what was in use before; see `peaks`."""
    return peaks(call, device=device)[0]


def peaks(*phases: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes in use at once, at most, during each of the calls, above what was in use before the first.

    The calls are made in order, once: what one leaves allocated counts for the next, as what a forward pass saves does
    for the backward pass. Call each before, so that what is allocated once and kept is not counted.

    Args:
        phases: calls without arguments; what they return is dropped.
        device: a CPU or a CUDA device.

    Raises:
        ValueError: the device is another.
    """
    if device.type == "cuda":
        return _peaks_on_cuda(phases, device)
    if device.type != "cpu":
        raise ValueError(f"peaks: device is {device}; memory is counted on a CPU and on CUDA devices only")
    with _no_native_messages(), profile(use_cpu=True, profile_memory=True) as recorded:
        for number, phase in enumerate(phases):
            with record_function(f"{_PHASE}{number}"):
                phase()
    assert recorded.kineto_results is not None
    # (nanoseconds, bytes) of blocks handed out, and, negative, of blocks taken back.
    changes: list[tuple[int, int]] = []
    starts = [0] * len(phases)
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(_PHASE):
            starts[int(event.name().removeprefix(_PHASE))] = event.start_ns()
    return _running_peaks(sorted(changes, key=lambda change: change[0]), starts)


def _running_peaks(changes: list[tuple[int, int]], starts: list[int]) -> list[int]:
    """The largest running sum of `changes` within each phase, which begins with what the one before left."""
    highest: list[int] = []
    in_use, position = 0, 0
    for end in [*starts[1:], sys.maxsize]:
        most = in_use
        while position < len(changes) and changes[position][0] < end:
            in_use += changes[position][1]
            most = max(most, in_use)
            position += 1
        highest.append(most)
    return highest


def _peaks_on_cuda(phases: tuple[Callable[[], object], ...], device: torch.device) -> list[int]:
    before = torch.cuda.memory_allocated(device)
    highest = []
    for phase in phases:
        torch.cuda.reset_peak_memory_stats(device)
        phase()
        highest.append(torch.cuda.max_memory_allocated(device) - before)
    return highest


@contextmanager
def _no_native_messages() -> Iterator[None]:
    """Keep what the profiler's C++ prints off the terminal: that it starts, and that older blocks were taken back."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
