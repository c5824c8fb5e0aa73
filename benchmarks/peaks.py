"""What the device can do at best, measured in the same run: the figures that a share of the peak refers to."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilewright.trainer.peak import measured_matmul_peak

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_COPIES = 15
_LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Peaks:
    """The peaks of one device.

    Attributes:
        bytes_per_second: read and written by a large copy; None where it could not be measured.
        flops_per_second: of square matrix products, by dtype ("bfloat16"); a dtype that is missing was not measured.
        note: why a figure is missing; empty if none is.
    """

    bytes_per_second: float | None
    flops_per_second: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def utilisation(self, flops_per_second: float, dtype: torch.dtype) -> float | None:
        """Share of the matmul peak: MFU, given a model's FLOP/s; None, never a guess, where the peak is unknown."""
        peak = self.flops_per_second.get(name_of(dtype))
        return flops_per_second / peak if peak else None


def name_of(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def measured_peaks(device: torch.device, dtypes: Iterable[torch.dtype]) -> Peaks:
    """Measure the peaks of `device`, in about two seconds; of what is neither CPU nor CUDA they are unknown."""
    if device.type not in _COPY_BYTES:
        return Peaks(None, note=f"the peaks of {device} are unknown: only those of CPUs and CUDA devices are measured")
    return Peaks(_copy_rate(device), {name_of(dtype): measured_matmul_peak(device, dtype) for dtype in dtypes})


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory; 0 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return 1024 * int(_LAST_LEVEL_CACHE.read_text(encoding="ascii").strip().removesuffix("K"))
    except (OSError, ValueError):
        return 0


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy far larger than any cache; the median of some."""
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_COPIES + 1)]  # type: ignore[no-untyped-call]
        for mark in marks:
            mark.record()
            target.copy_(source)
        torch.cuda.synchronize()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]
    else:
        clock = [(time.perf_counter(), target.copy_(source))[0] for _ in range(_COPIES + 1)]
        seconds = [end - start for start, end in itertools.pairwise(clock)]
    return float(2 * source.nbytes / statistics.median(seconds))
