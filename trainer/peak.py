"""What the machine can do at best and what the process has taken: the two figures that a run is measured against.

The matmul peak is measured, not looked up, so that model FLOPs utilisation (MFU) is stated against the device that the
run is really on, with the clocks and threads that it really gets.
"""

from __future__ import annotations

import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_CPU_SIZES = (512, 1024, 2048)
_CUDA_SIZES = (4096, 8192)
# Each size of the CPU may take this long; where even one repeat of the next size would take longer, it is left out.
_CPU_SECONDS_PER_SIZE = 0.3
_CPU_REPEATS = (3, 50)
_CUDA_REPEATS = 20

_Matmul = Callable[[], torch.Tensor]


def measured_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on `device`: the median of the repeats for each size, the best size taken.

    Takes about a second. Random numbers come from a generator of its own, so the run's stay as they were. On CUDA the
    cache is emptied and the peak of allocated memory set back afterwards, since the matrices are none of the run's.
    float32 on CUDA is measured as ``torch.set_float32_matmul_precision`` stands.

    Args:
        device: a CPU or a CUDA device.
        dtype: a floating-point type; that of the run's matrix products.

    Raises:
        ValueError: the dtype is not floating-point, or the device neither a CPU nor a CUDA device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"measured_matmul_peak: device is {device}; it must be a CPU or a CUDA device")
    if not dtype.is_floating_point:
        raise ValueError(f"measured_matmul_peak: dtype is {dtype}; it must be a floating-point type")
    if device.type == "cpu":
        return _best_rate(_CPU_SIZES, lambda size: _seconds_on_cpu(_matmul(size, device, dtype), size))
    with torch.cuda.device(device):
        peak = _best_rate(_CUDA_SIZES, lambda size: _seconds_on_cuda(_matmul(size, device, dtype)))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use at once so far: tensors on a CUDA `device`, else resident bytes of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _high_water_mark() or _max_resident_bytes()


def _best_rate(sizes: Sequence[int], seconds_of: Callable[[int], list[float]]) -> float:
    """FLOP/s of the best size; `seconds_of` a size gives one time for each repeat, none to leave out what is larger."""
    best = 0.0
    for size in sizes:
        seconds = seconds_of(size)
        if not seconds:
            break
        best = max(best, 2 * size**3 / statistics.median(seconds))
    return best


def _matmul(size: int, device: torch.device, dtype: torch.dtype) -> _Matmul:
    # Zeros would let a GPU draw less power and clock higher than on real numbers.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    return lambda: torch.mm(left, right, out=product)


@torch.no_grad()
def _seconds_on_cpu(matmul: _Matmul, size: int) -> list[float]:
    warm_up = _seconds(matmul)
    if size > _CPU_SIZES[0] and warm_up > _CPU_SECONDS_PER_SIZE:
        return []
    # The first product also starts threads and packs code: the second tells how many repeats fit.
    fewest, most = _CPU_REPEATS
    repeats = int(_CPU_SECONDS_PER_SIZE / max(_seconds(matmul), 1e-6))
    return [_seconds(matmul) for _ in range(min(max(repeats, fewest), most))]


def _seconds(matmul: _Matmul) -> float:
    start = time.perf_counter()
    matmul()
    return time.perf_counter() - start


@torch.no_grad()
def _seconds_on_cuda(matmul: _Matmul) -> list[float]:
    for _ in range(3):
        matmul()
    # All are queued before the first is waited for, so that no time between launches is counted.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_CUDA_REPEATS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        matmul()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def _high_water_mark(status: Path = Path("/proc/self/status")) -> int:
    """Peak resident bytes of this process as Linux keeps it; 0 where it does not.

    getrusage would count what the process that started this one held at that moment: Linux carries it across exec.
    """
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _max_resident_bytes() -> int:
    import resource  # not there on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
