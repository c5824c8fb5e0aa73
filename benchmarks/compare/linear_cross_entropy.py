"""``make compare-loss``: `linear_cross_entropy` beside logits with `F.cross_entropy`, and `F.linear_cross_entropy`.

Forward and backward from hidden states (4,096 tokens, width 1,024) and a head of 32,000 and 131,072 classes, the
gradients of both asked for. Rounds are interleaved; time is a ratio within each round, and memory the most bytes that
PyTorch has allocated at once above the inputs, counted, temporaries and gradients included.

Bars: at most 0.25 of the memory of logits with `F.cross_entropy`; no slower than the faster of the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

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

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    console = Console(highlight=False)
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

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

    steps = {name: step(loss) for name, loss in PROVIDERS.items()}
    exact = _exact(hidden, weight, targets)
    errors = {name: abs(loss(hidden, weight, targets).item() / exact - 1) for name, loss in PROVIDERS.items()}
    _check(errors)
    memory = {name: peak_bytes(call, hidden.device) for name, call in steps.items()}
    seconds = interleaved(steps, rounds)
    confidence = confidence_of(rounds)
    times = (f"{figure} ({100 * confidence:.3g}%)" for figure in ("seconds", "÷ ours"))
    table = Table("provider", *times, "peak memory", "÷ eager", "loss off by")
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
            f"{errors[name]:.1e}",
        )
    console.print(table)
    fastest = min((name for name in steps if name != OURS), key=lambda name: statistics.median(seconds[name]))
    fast = paired_ratio(seconds[OURS], seconds[fastest], confidence)
    small = memory[OURS] / memory[EAGER] <= MEMORY_BAR
    console.print(f"{'holds' if small else 'FAILS'}  {memory[OURS] / memory[EAGER]:.2f} of eager's memory")
    console.print(f"{'holds' if fast.median <= 1 else 'FAILS'}  {fast.median:.2f} of the time of {fastest}")
    return small and fast.median <= 1


def _exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> float:
    """The loss from float32 products, a few rows at a time."""
    with torch.no_grad():
        wide = weight.float()
        total = 0.0
        for start in range(0, TOKENS, 256):
            rows = slice(start, start + 256)
            logits = F.linear(hidden[rows].float(), wide)
            total += F.cross_entropy(logits, targets[rows], reduction="sum").item()
    return total / TOKENS


def _check(errors: dict[str, float]) -> None:
    """Refuse to time what computes something else; F.linear_cross_entropy, which sums in bfloat16, is off by 9%."""
    for name, error in errors.items():
        if not error < (0.001 if name == OURS else 0.2):
            raise SystemExit(f"compare-loss: the loss of {name} is off by {error:.1%}")


if __name__ == "__main__":
    main()
