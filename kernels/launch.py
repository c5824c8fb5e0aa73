"""Launch configurations: block sizes, warps and stages, read from a table per GPU generation.

There is no autotuning at run time: ranks that choose apart compute apart, or wait for each other for ever. A row of
the table is chosen by the generation and by one size (a row width, a head dimension): the first row that covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched for sizes up to `up_to`.

    `blocks` holds the kernel's block sizes by their constexpr names. A block size of 0 stands for "the size itself,
    rounded up to a power of two".
    """

    up_to: int
    num_warps: int
    blocks: dict[str, int] = field(default_factory=dict)
    num_stages: int = 1


class LaunchTable:
    """The configurations of one kernel, per GPU generation (compute capability × 10: 80 for A100, 90 for H100).

    A generation that the table does not name takes the nearest older one, or the oldest.
    """

    def __init__(self, generations: dict[int, tuple[Configuration, ...]]) -> None:
        self.generations = generations
        self._forced: Configuration | None = None

    def pick(self, size: int, device: torch.device) -> Configuration:
        """The configuration for `size` on `device`.

        Raises:
            ValueError: no configuration covers `size`.
        """
        if self._forced is not None:
            return self._forced
        for row in self.rows(generation(device)):
            if size <= row.up_to:
                return row
        raise ValueError(f"size {size} is past the largest that a launch configuration covers")

    def rows(self, chip: int) -> tuple[Configuration, ...]:
        """The rows that hold on one generation."""
        older = [known for known in self.generations if known <= chip]
        return self.generations[max(older) if older else min(self.generations)]

    def choices(self) -> list[Configuration]:
        """Every configuration that can be chosen on any generation, each once."""
        found: list[Configuration] = []
        for rows in self.generations.values():
            found.extend(row for row in rows if row not in found)
        return found

    def largest(self) -> int:
        """The largest size that every generation's rows cover."""
        return min(rows[-1].up_to for rows in self.generations.values())

    @contextmanager
    def force(self, configuration: Configuration) -> Iterator[None]:
        """Launch with `configuration`, whatever the size and the device, inside the ``with`` block."""
        self._forced = configuration
        try:
            yield
        finally:
            self._forced = None


# Streaming multiprocessors by generation: A100, H100 SXM, B200.
PROCESSORS = {80: 108, 90: 132, 100: 148}

_generation_override: int | None = None
_processors_override: int | None = None


@contextmanager
def as_if_on(chip: int, processors: int | None = None) -> Iterator[None]:
    """Choose launches as on another generation (80, 90), to compile for a GPU that this machine does not have.

    Args:
        chip: compute capability × 10.
        processors: how many streaming multiprocessors it has; those of the generation's known GPU where left out.
    """
    global _generation_override, _processors_override
    previous = _generation_override, _processors_override
    _generation_override, _processors_override = chip, processors or PROCESSORS.get(chip, 132)
    try:
        yield
    finally:
        _generation_override, _processors_override = previous


def ahead_of_time() -> bool:
    """Whether launches are being chosen for a GPU that is not there, to be compiled and not run."""
    return _generation_override is not None


def generation(device: torch.device) -> int:
    """Compute capability × 10 of `device`; 90 for a CPU, where only the interpreter runs kernels."""
    if _generation_override is not None:
        return _generation_override
    return _capability(device.index) if device.type == "cuda" else 90


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`: the number of programs that a persistent kernel starts."""
    if _processors_override is not None:
        return _processors_override
    # The interpreter runs programs one after another; a few are enough to exercise the split of the work.
    return _multi_processors(device.index) if device.type == "cuda" else 4


# Asked on every launch, and never different: the driver is asked once.
@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache
def _multi_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
