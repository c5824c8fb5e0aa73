"""What an eager call costs before its kernel is launched, in microseconds a call, on any machine.

    python benchmarks/kernels/dispatch_overhead.py

Each provider computes an RMSNorm's outputs and, where a gradient is asked for, records its backward pass. The kernel
launches themselves are replaced by nothing, so what is left is what Python, PyTorch and the checks of arguments take:

- ``launch``: Tilewright's host code alone (allocation, grid, launch configuration), called directly;
- ``tilewright``: the public ``rms_norm``, which ends in that host code;
- ``custom_op``: a bare ``torch.library.custom_op`` around the same host code, with no checks of its own;
- ``torch.nn.functional``: ``F.rms_norm`` on a tensor of one row, whose arithmetic is nearly nothing.

The dispatch overhead is the time of a provider less that of ``launch``. Rounds are interleaved; the medians over the
rounds are printed with their 95% intervals (order statistics).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from triton.runtime import JITFunction

import tilewright.kernels
from tilewright.kernels.dispatch import use
from tilewright.kernels.launch import as_if_on

NORM = sys.modules["tilewright.kernels.rms_norm"]  # the attribute of that name is the function
ROUNDS, CALLS = 41, 500


@torch.library.custom_op("bare::rms_norm", mutates_args=())
def _bare(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = NORM._launch_forward(x, weight, None, eps, 0.0)
    return y, rstd


@torch.library.custom_op("bare::rms_norm_backward", mutates_args=())
def _bare_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = NORM._launch_backward(dy, None, x, weight, rstd, 0.0)
    return dx, dweight


_bare.register_autograd(
    lambda ctx, dy, _: (*_bare_backward(dy, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[1], output[1]),
)

PROVIDERS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "launch": lambda x, weight: NORM._launch_forward(x, weight, None, 1e-6, 0.0)[0],
    "tilewright": lambda x, weight: tilewright.kernels.rms_norm(x, weight),
    "custom_op": lambda x, weight: _bare(x, weight, 1e-6)[0],
    "torch.nn.functional": lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, 1e-6),
}


def measure(gradient: bool) -> dict[str, list[float]]:
    """Microseconds a call, by provider and round."""
    x = torch.randn(1, 64, requires_grad=gradient)
    weight = torch.ones(64, requires_grad=gradient)
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(ROUNDS):
        for name, call in PROVIDERS.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call(x, weight)
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return times


def median_and_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and the order statistics that hold it with 95% confidence (binomial, normal approximation)."""
    ordered, count = sorted(values), len(values)
    reach = round(0.98 * count**0.5)
    middle = count // 2
    return statistics.median(ordered), ordered[middle - reach], ordered[middle + reach]


def main() -> None:
    """Measure and print both tables."""
    torch.set_num_threads(1)
    JITFunction.run = lambda self, *args, **options: None
    with as_if_on(90), use("triton"):
        for gradient in (False, True):
            times = measure(gradient)
            print(f"\nforward call, {'a gradient is recorded' if gradient else 'no gradient'}; microseconds a call")
            print(f"{'provider':<22}{'total':>8}{'95% interval':>18}{'overhead':>10}{'of custom_op':>14}")
            overheads = {
                name: [a - b for a, b in zip(values, times["launch"], strict=True)] for name, values in times.items()
            }
            bare = statistics.median(overheads["custom_op"])
            for name, values in times.items():
                median, low, high = median_and_interval(values)
                overhead = statistics.median(overheads[name])
                ratio = "" if name in ("launch", "torch.nn.functional") else f"{overhead / bare:.2f}"
                shown = "" if name in ("launch", "torch.nn.functional") else f"{overhead:.1f}"
                print(f"{name:<22}{median:>8.1f}{f'{low:.1f} to {high:.1f}':>18}{shown:>10}{ratio:>14}")


if __name__ == "__main__":
    main()
