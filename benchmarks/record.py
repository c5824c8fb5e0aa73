"""What a benchmark writes beside its times: where it was measured, and what each derived figure means."""

from __future__ import annotations

import csv
import subprocess
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewright.benchmarks.measure import median_interval
from tilewright.benchmarks.peaks import Peaks, measured_peaks, name_of
from tilewright.kernels.opspec import Work
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.record import environment as machine

# In the record under the name that a row's `extra_info` uses.
DEFINITIONS = {
    "median_seconds": "the median of the rounds, each the mean over `copies` of the same call on buffers of their own",
    "interval_seconds": "the order statistics of the rounds that hold their median with 95% confidence (binomial)",
    "rounds": "how often every provider of the case was timed; in each round all of them, in an order drawn anew; "
    "`stats.data` holds the seconds of each round, so those of one case can be compared in pairs",
    "copies": "sets of inputs that a round goes through, so that each finds the cache cold: as many "
    "as memory and time allow",
    "cold": "whether the sets of inputs together are known to be twice the last cache or more; where not, they may be "
    "read from the cache, bytes_per_second is no bandwidth of memory, and `note` says so",
    "pass": "forward: with a gradient asked for, where the op has one, so what is saved or computed ahead for the "
    "backward pass is in it; backward: of all inputs that take a gradient; both: one after the other",
    "provider": "ours: what `tilewright.kernels` runs on this device, which `implementation` names; torch eager: the "
    "same mathematics in plain PyTorch, the op's reference; torch.compile and ours compiled: these through Inductor; "
    "torch fused: PyTorch's own fused op",
    "bytes_per_second": "compulsory bytes ÷ median_seconds: each input read once, each output written once, whatever "
    "the provider really moves",
    "flops_per_second": "required floating-point operations ÷ median_seconds, whatever the provider really computes",
    "share_of_measured_peak": "the least time that the measured peaks allow ÷ median_seconds: the longer of "
    "compulsory bytes ÷ peaks.bytes_per_second (`bound` memory) and required operations ÷ "
    "peaks.flops_per_second of the dtype (`bound` compute); null where a peak is unknown or the cache was not cold",
    "peaks": "bytes_per_second: read and written by a large copy; flops_per_second: of square matrix products; both "
    "measured on the same device at the start of the run",
    "peak_memory_bytes": "inputs (for backward and both also upstream gradients) and what is allocated besides, at "
    "most at once: counted from allocations, temporaries within an operation included",
    "algorithm_memory_bytes": "inputs and outputs, for backward and both also upstream gradients and gradients, each "
    "once; nothing that is saved between the passes",
    "compile_seconds": "the first forward and backward call less the second; on disk is cached only what this run "
    "compiled; null where nothing is compiled, or Inductor had compiled the same graph before in this run",
    "error_ratio": "the largest error against float64 ÷ the largest that is accepted; a provider above 1 is not timed",
    "mfu": "required FLOPs of the model ÷ seconds ÷ peaks.flops_per_second; null, never guessed, where that is unknown",
}

_GPU_STATE = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "sm_clock_limit_mhz",
    "clocks.max.mem": "memory_clock_limit_mhz",
    "power.limit": "power_limit_watts",
    "power.draw": "power_draw_watts",
    "temperature.gpu": "temperature_celsius",
}


@dataclass
class Session:
    """What one run of the benchmarks shares: its device, that device's peaks and state, and what has no time.

    Attributes:
        left_out: rows (dicts of op, sample, dtype, provider, reason) of providers that are not here or lack something.
        refused: likewise of those that failed or computed something else.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    peaks: Peaks
    environment: dict[str, Any]
    left_out: list[dict[str, str]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Session:
        """Measure the device's peaks and note its state; the clocks are those under load, right after."""
        peaks = measured_peaks(device, dtypes)
        return cls(device, dtypes, peaks, environment(device))

    def as_json(self) -> dict[str, Any]:
        """What is written beside the times."""
        return {
            "format": 1,
            "environment": self.environment,
            "definitions": DEFINITIONS,
            "peaks": self.peaks.as_json(),
            "left_out": self.left_out,
            "refused": self.refused,
        }


def device_of(name: str) -> torch.device:
    """The device to benchmark: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        TrainingError: a GPU is asked for where torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device is cuda, but torch sees no GPU; `tilewright doctor` says what is missing")
    # With its index, so that it equals the device of a tensor there.
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def dtypes_of(device: torch.device, *, quick: bool) -> tuple[torch.dtype, ...]:
    """The dtypes that are timed; float16, which no CPU computes in, on a GPU alone."""
    if quick:
        return (torch.bfloat16,)
    return (torch.bfloat16, torch.float32, *((torch.float16,) if device.type == "cuda" else ()))


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and code as a training run records them, with each GPU's clocks, power and temperature now."""
    facts = machine.environment(device)
    for gpu, state in zip(facts["gpus"], _gpu_states(len(facts["gpus"])), strict=True):
        gpu.update(state)
    return facts


def timing(seconds: list[float], work: Work, dtype: torch.dtype, peaks: Peaks, *, cold: bool) -> dict[str, Any]:
    """The columns that follow from the rounds' seconds of one pass.

    Args:
        work: what the pass cannot do without.
        cold: whether each call found the cache cold; else memory's bandwidth is no bound of it.
    """
    median, low, high = median_interval(seconds)
    columns: dict[str, Any] = {
        "median_seconds": median,
        "interval_seconds": [low, high],
        "rounds": len(seconds),
        "bytes_per_second": work.bytes / median,
        "flops_per_second": work.flops / median,
        "share_of_measured_peak": None,
        "bound": None,
    }
    compute = peaks.flops_per_second.get(name_of(dtype))
    if peaks.bytes_per_second is None or compute is None:
        return columns
    floors = {"memory": work.bytes / peaks.bytes_per_second, "compute": work.flops / compute}
    columns["bound"] = max(floors, key=lambda bound: floors[bound])
    if cold or columns["bound"] == "compute":
        columns["share_of_measured_peak"] = max(floors.values()) / median
    return columns


def _gpu_states(gpus: int) -> list[dict[str, float | None]]:
    """What nvidia-smi says of each GPU that this process sees; None for what cannot be had."""
    unknown: dict[str, float | None] = dict.fromkeys(_GPU_STATE.values())
    states = []
    for index in range(gpus):
        # Its own numbering is not torch's where CUDA_VISIBLE_DEVICES hides some, so it is asked by identity.
        identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        states.append(_queried(identity) or unknown)
    return states


def _queried(identity: str) -> dict[str, float | None] | None:
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = next(csv.reader([done.stdout.strip()], skipinitialspace=True), [])
    if len(values) != len(_GPU_STATE):
        return None
    return dict(zip(_GPU_STATE.values(), map(_number, values), strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
