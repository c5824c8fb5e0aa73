"""``make compare-loss``: `linear_cross_entropy` beside logits with `F.cross_entropy`, and `F.linear_cross_entropy`.

Forward and backward from hidden states (4,096 tokens, width 1,024) and a head of 32,000 and 131,072 classes, the
gradients of both asked for. Rounds are interleaved; time is a ratio within each round, and memory the most bytes that
PyTorch has allocated at once above the inputs, counted, temporaries and gradients included. Loss and gradients of all
are compared with those of float32 products.

Bars: at most 0.25 of the memory of logits with `F.cross_entropy`; no slower than the faster of the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn import LinearCrossEntropyOptions

from tilewright.benchmarks.allocations import peak_bytes
from tilewright.benchmarks.measure import LEAST_ROUNDS, confidence_of, interleaved, median_interval, paired_ratio
from tilewright.kernels import linear_cross_entropy

TOKENS, WIDTH, CLASSES = 4096, 1024, (32000, 131072)
OURS, EAGER = "tilewright", "logits + F.cross_entropy"
MEMORY_BAR = 0.25
GRADIENT_ERRORS = {
    torch.bfloat16: 0.01,
    torch.float32: 1e-5,
}  # relative; a gradient is itself rounded by 0.002 in bfloat16

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Results(NamedTuple):
    """The mean loss () and its gradients with respect to hidden states (tokens, width) and weight (classes, width)."""

    loss: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor

    def errors(self, exact: Results) -> list[float]:
        """Relative distance of each from `exact`, in the Euclidean norm."""
        return [((mine.float() - other).norm() / other.norm()).item() for mine, other in zip(self, exact, strict=True)]


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = linear_cross_entropy(hidden, weight, targets)
    assert isinstance(loss, torch.Tensor)
    return loss


PROVIDERS: dict[str, Loss] = {
    OURS: _ours,
    EAGER: lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight), targets),
    "F.linear_cross_entropy": lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, options=LinearCrossEntropyOptions()
    ),
}


def main() -> None:
    """Measure and print; exit status 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(prog="make compare-loss")
    parser.add_argument("--rounds", type=int, default=7)
    dtypes, help = ("bfloat16", "float32"), "float32 takes half an hour more"
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["bfloat16"], help=help)
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    arguments = parser.parse_args()
    if arguments.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds is {arguments.rounds}, of which no interval can be made; at least {LEAST_ROUNDS}")
    if min(arguments.classes) < 2:
        parser.error(f"--classes is {min(arguments.classes)}; at least 2 make a loss")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # a file has room for the table
    holds = [
        compare(classes, getattr(torch, dtype), arguments.rounds, console)
        for dtype in arguments.dtypes
        for classes in arguments.classes
    ]
    sys.exit(0 if all(holds) else 1)


def compare(classes: int, dtype: torch.dtype, rounds: int, console: Console) -> bool:
    """One table; whether the bars hold."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = (torch.randn(classes, WIDTH) / WIDTH**0.5).to(dtype).requires_grad_()
    targets = torch.randint(classes, (TOKENS,))

    def step(loss: Loss) -> Callable[[], Results]:
        def call() -> Results:
            value = loss(hidden, weight, targets)
            return Results(value.detach(), *torch.autograd.grad(value, (hidden, weight)))

        return call

    steps = {name: step(loss) for name, loss in PROVIDERS.items()}
    exact = _exact(hidden, weight, targets)
    errors = {name: call().errors(exact) for name, call in steps.items()}
    del exact
    _check(errors, dtype)
    memory = {name: peak_bytes(call, hidden.device) for name, call in steps.items()}
    seconds = interleaved(steps, rounds)
    confidence = confidence_of(rounds)
    times = (f"{figure} ({100 * confidence:.3g}%)" for figure in ("seconds", "÷ ours"))
    table = Table("provider", *times, "peak memory", "÷ eager", "loss off by", "its gradients")
    table.title = f"{dtype}, {classes:,} classes"
    table.columns[0].no_wrap = True
    for name in steps:
        time = median_interval(seconds[name], confidence)
        ratio = paired_ratio(seconds[name], seconds[OURS], confidence)
        table.add_row(
            name,
            f"{time.median:.2f} ({time.low:.2f} to {time.high:.2f})",
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            f"{memory[name] / 1e6:,.0f} MB",
            f"{memory[name] / memory[EAGER]:.2f}",
            f"{errors[name][0]:.1e}",
            f"{errors[name][1]:.1e}, {errors[name][2]:.1e}",
        )
    console.print(table)
    fastest = min((name for name in steps if name != OURS), key=lambda name: statistics.median(seconds[name]))
    fast = paired_ratio(seconds[OURS], seconds[fastest], confidence)
    small = memory[OURS] / memory[EAGER] <= MEMORY_BAR
    console.print(f"{'holds' if small else 'FAILS'}  {memory[OURS] / memory[EAGER]:.2f} of eager's memory")
    console.print(f"{'holds' if fast.median <= 1 else 'FAILS'}  {fast.median:.2f} of the time of {fastest}")
    return small and fast.median <= 1


def _exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Results:
    """Those of float32 products, a few rows at a time."""
    rows, wide = hidden.detach().float(), weight.detach().float().requires_grad_()
    exact = Results(torch.zeros(()), torch.empty_like(rows), torch.zeros_like(wide))
    for start in range(0, TOKENS, 256):
        span = slice(start, start + 256)
        some = rows[span].clone().requires_grad_()
        part = F.cross_entropy(F.linear(some, wide), targets[span], reduction="sum") / TOKENS
        gradients = torch.autograd.grad(part, (some, wide))
        exact.loss.add_(part.detach())
        exact.hidden[span] = gradients[0]
        exact.weight.add_(gradients[1])
    return exact


def _check(errors: dict[str, list[float]], dtype: torch.dtype) -> None:
    """Refuse to time what computes something else.

    Ours must have the loss to 0.1% and gradients within `GRADIENT_ERRORS`; the others' errors are wider
    (`F.linear_cross_entropy` sums the loss in `dtype`: 9% off over 131,072 classes) and stand in the table.
    """
    names = ("loss", "gradient of hidden states", "gradient of weights")
    for name, found in errors.items():
        limits = (0.001, *2 * [GRADIENT_ERRORS[dtype]]) if name == OURS else (0.2, 0.2, 0.2)
        for what, error, most in zip(names, found, limits, strict=True):
            if not error <= most:
                raise SystemExit(
                    f"compare-loss: the {what} of {name} is off by {error:.1%}; at most {most:.2%} is timed"
                )


if __name__ == "__main__":
    main()
