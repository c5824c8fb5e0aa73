"""``make compare``: the training step of Tilewright beside that of other trainers, in fresh processes, interleaved.

Every round runs each provider once, in a process of its own with the machine's default threads, in an order that
turns from round to round. A round's figure is the median of its steps after the first three; shown are medians over the
rounds with the 95% interval, and the ratio to the best peer within each round. The first round is as long as the
comparison of losses asks; the others are shorter.

Bars: at least 1.3 times the best peer's tokens/s, at most 0.85 of its peak resident memory, and the loss of the same
steps in float32, from which bfloat16 trainers stray to either side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tilewright.benchmarks.compare.prepare import CLONE, peers_python, prepare
from tilewright.benchmarks.compare.providers import EXACT, PROVIDERS, Provider
from tilewright.benchmarks.compare.shapes import SHAPES, Shape
from tilewright.benchmarks.measure import LEAST_ROUNDS, confidence_of, median_interval
from tilewright.benchmarks.record import environment
from tilewright.trainer.errors import TrainingError

OURS = "tilewright"
WARM_UP = 3
SPEED_BAR, MEMORY_BAR = 1.3, 0.85
# Of the last loss from that of float32, relatively.
LOSS_BAR = 0.01


@dataclass
class Runs:
    """What one provider did in each round."""

    tokens_per_second: list[float] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)
    first_step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main() -> None:
    """Compare, print, judge; exit status 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(prog="make compare")
    parser.add_argument("--shape", choices=SHAPES, default="42M")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30, help="of the first round")
    parser.add_argument("--short-steps", type=int, default=12, help="of the other rounds")
    parser.add_argument("--only", nargs="*", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--json", type=Path, default=CLONE / "runs" / "compare.json")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # a file has room for the table
    try:
        _check(arguments)
        sys.exit(compare(arguments, console))
    except TrainingError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)


def _check(arguments: argparse.Namespace) -> None:
    least = WARM_UP + 1
    if arguments.rounds < LEAST_ROUNDS:
        raise TrainingError(
            f"--rounds is {arguments.rounds}, of which no interval can be made; at least {LEAST_ROUNDS}"
        )
    if not least <= arguments.short_steps <= arguments.steps:
        raise TrainingError(
            f"--short-steps is {arguments.short_steps} and --steps {arguments.steps}; the first {WARM_UP} of a round "
            f"are not counted, so they must be at least {least}, and --short-steps at most --steps"
        )


def compare(arguments: argparse.Namespace, console: Console) -> int:
    """All rounds, the tables and the record; returns the exit status."""
    shape = SHAPES[arguments.shape]
    folder = CLONE / "build" / "compare" / arguments.shape.replace(" ", "-")
    providers = {name: PROVIDERS[name] for name in arguments.only}
    python = peers_python(console) if any(provider.peer for provider in providers.values()) else Path(sys.executable)
    prepare(folder, shape, arguments.steps, console)
    runs = {name: Runs() for name in providers}
    for number in range(arguments.rounds):
        steps = arguments.short_steps if number else arguments.steps
        turned = list(providers)[number % len(providers) :] + list(providers)[: number % len(providers)]
        for name in turned:
            run_once(runs[name], providers[name], python, folder, shape, steps)
            rate = runs[name].tokens_per_second[-1]
            console.print(f"round {number + 1}/{arguments.rounds}  {name:<34} {rate:>8,.0f} tokens/s")
    exact = exact_losses(python, folder, shape, arguments.steps, console) if best_peer(runs) else None
    record = {
        "environment": environment(torch.device("cpu")),
        "shape": {arguments.shape: shape._asdict()},
        "definitions": {"warm_up_steps": WARM_UP, "method": __doc__},
        "runs": {name: vars(run) for name, run in runs.items()},
        "losses_in_float32": exact,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1))
    console.print(table(runs, exact))
    verdicts = judge(runs, exact) if exact else []
    for holds, sentence in verdicts:
        console.print(f"{'holds' if holds else 'FAILS'}  {sentence}")
    if not verdicts:
        console.print(f"no bar was judged: that takes {OURS} and a peer; name both with --only, or leave it out")
    console.print(f"record {arguments.json}")
    return 0 if verdicts and all(holds for holds, _ in verdicts) else 1


def run_once(run: Runs, provider: Provider, python: Path, folder: Path, shape: Shape, steps: int) -> None:
    """One process of one provider.

    Raises:
        TrainingError: it failed.
    """
    interpreter = str(python) if provider.peer else sys.executable
    script = str(Path(__file__).parent / provider.script)
    command = [interpreter, script, str(folder), str(steps), *provider.options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    *taken, end = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    seconds = [line["seconds"] for line in taken]
    run.first_step_seconds.append(seconds[0])
    run.tokens_per_second.append(shape.sequences * shape.length / statistics.median(seconds[WARM_UP:]))
    run.peak_rss_bytes.append(end["peak_rss_bytes"])
    if not run.losses:
        run.losses = [line["loss"] for line in taken]


def exact_losses(python: Path, folder: Path, shape: Shape, steps: int, console: Console) -> list[float]:
    """The losses of the same steps in float32."""
    console.print("the same steps in float32, for their losses")
    run = Runs()
    run_once(run, EXACT, python, folder, shape, steps)
    return run.losses


def best_peer(runs: dict[str, Runs]) -> str | None:
    """The peer with the most tokens/s."""
    peers = {name: statistics.median(run.tokens_per_second) for name, run in runs.items() if name != OURS}
    return max(peers, key=lambda name: peers[name]) if peers else None


def table(runs: dict[str, Runs], exact: list[float] | None) -> Table:
    """One row for each provider; `exact`: the losses of float32."""
    confidence = confidence_of(len(next(iter(runs.values())).tokens_per_second))
    rates = (f"{figure} ({100 * confidence:.3g}%)" for figure in ("tokens/s", "÷ best peer"))
    shown = Table("provider", *rates, "peak RSS", "first step", "loss 1", "last loss", "off float32")
    shown.columns[0].no_wrap = True
    best = best_peer(runs)
    for name, run in runs.items():
        rate = median_interval(run.tokens_per_second, confidence)
        ratio = median_interval(ratios(run, runs[best]), confidence) if best else None
        shown.add_row(
            name,
            f"{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})",
            f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "",
            f"{statistics.median(run.peak_rss_bytes) / 1e9:.2f} GB",
            f"{statistics.median(run.first_step_seconds):.0f} s",
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{run.losses[-1] / exact[-1] - 1:+.2%}" if exact else "",
        )
    return shown


def ratios(run: Runs, peer: Runs) -> list[float]:
    """tokens/s of one over that of the other, within each round."""
    return [a / b for a, b in zip(run.tokens_per_second, peer.tokens_per_second, strict=True)]


def judge(runs: dict[str, Runs], exact: list[float]) -> list[tuple[bool, str]]:
    """Whether each bar holds, as a sentence with the figures."""
    best = best_peer(runs)
    if best is None or OURS not in runs:
        return []
    ours, peer = runs[OURS], runs[best]
    speed = statistics.median(ratios(ours, peer))
    memory = statistics.median(ours.peak_rss_bytes) / statistics.median(peer.peak_rss_bytes)
    apart = abs(ours.losses[-1] / exact[-1] - 1)
    return [
        (speed >= SPEED_BAR, f"{speed:.2f} times the tokens/s of {best}; the bar is {SPEED_BAR}"),
        (memory <= MEMORY_BAR, f"{memory:.2f} of its peak resident memory; the bar is {MEMORY_BAR}"),
        (apart <= LOSS_BAR, f"loss after {len(ours.losses)} steps within {apart:.2%} of float32's"),
    ]


if __name__ == "__main__":
    main()
