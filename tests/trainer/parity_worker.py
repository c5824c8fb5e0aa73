"""One process of the parity matrix: ``torchrun … parity_worker.py``. Each line that it prints is a failure.

Every case takes a step's gradients twice, sharded over the processes in micro-batches, and by a plain model in this
process on the whole batch at once.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewright.model import Transformer, from_preset, initialise
from tilewright.trainer.optimization.optimizer import build_optimizer
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.parallel.traffic import Traffic, Volume, step_traffic
from tilewright.trainer.recipe import ActivationCheckpointing, Optimizer, Parallel
from tilewright.trainer.step import MicroBatch, place_of, train_step

SEQUENCES, LENGTH = 16, 12
# Rows that no number of processes divides, so that shards are padded and some are smaller than others.
CONFIG = from_preset(
    "llama-10m", vocab_size=37, hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=27,
    max_sequence_length=LENGTH, initial_std=0.2,
)  # fmt: skip
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """How a step is taken, and on what."""

    parallel: Parallel
    micro_batches: int
    ragged: bool
    packed: bool
    checkpointing: ActivationCheckpointing
    compile: bool = False


class Gradients(torch.optim.Optimizer):
    """Keeps what another optimizer would have stepped by."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model.parameters(), {})
        self.model, self.kept = model, dict[str, torch.Tensor]()

    def step(self) -> None:  # type: ignore[override]
        """Keep whole gradients, gathered after the step's own traffic has been counted."""
        self.kept = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Traced(TorchDispatchMode):
    """Counts collectives, and the bytes of the larger side of each.

    PyTorch's CommDebugMode counts no bytes, and its hooks on modules fail where a block is computed again.
    """

    KINDS: ClassVar = {
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {kind: [] for kind in self.KINDS.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as the ops and collectives that it is made of
        namespace, _, name = str(func).partition(".")
        if "c10d" in namespace:
            sides = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.seen[self.KINDS[name.partition(".")[0]]].append(max(x.numel() * x.element_size() for x in sides))
        return func(*args, **(kwargs or {}))

    def traffic(self) -> Traffic:
        """What was counted."""
        return Traffic(**{kind: Volume(len(seen), sum(seen)) for kind, seen in self.seen.items()})


def batch(ragged: bool, packed: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Inputs and targets (sequences, length) and where documents start in them, flattened."""
    generator = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(37, (SEQUENCES, LENGTH), generator=generator) for _ in range(2))
    starts = []
    for row in range(SEQUENCES):
        # Ragged: row 0 has one valid token, row 1 none, so that a whole process may have none either.
        if ragged:
            targets[row, {0: 1, 1: 0}.get(row, 3 + row % 9) :] = -100
        cuts = [0, 1 + row % 5, 7 + row % 5] if ragged else [0, 4, 8]
        starts += [row * LENGTH + cut for cut in (cuts if packed else [0])]
    return inputs, targets, [*starts, SEQUENCES * LENGTH]


def share(case: Case, processes: World) -> list[MicroBatch]:
    """This process's micro-batches."""
    inputs, targets, starts = batch(case.ragged, case.packed)
    rows = SEQUENCES // processes.size // case.micro_batches
    mine = []
    for number in range(case.micro_batches):
        first = (processes.rank * case.micro_batches + number) * rows
        low, high = first * LENGTH, (first + rows) * LENGTH
        cu_seqlens = torch.tensor([start - low for start in starts if low <= start <= high], dtype=torch.int32)
        span = slice(first, first + rows)
        mine.append(MicroBatch(inputs[span], targets[span], cu_seqlens if case.packed else None))
    return mine


def expected(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a plain model on the whole batch."""
    inputs, targets, starts = batch(case.ragged, case.packed)
    model = Transformer(CONFIG)
    initialise(model, 5)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32) if case.packed else None
    loss = model(inputs, targets, cu_seqlens) / (targets != -100).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(case: Case, processes: World) -> None:
    """One case: loss, norm, every gradient and the traffic of the step."""
    model = sharded_model(
        CONFIG, processes, compute_dtype=torch.float32, compile=case.compile, seed=5, parallel=case.parallel,
        activation_checkpointing=case.checkpointing,
    )  # fmt: skip
    optimizer = Gradients(model)
    traced = Traced()
    # A compiled block runs under no dispatch mode; its collectives lie outside it and are the same.
    with nullcontext() if case.compile else traced:
        result = train_step(
            model, optimizer, share(case, processes), processes, max_grad_norm=0.0,
            reduce_every=case.parallel.reduce == "every",
        )  # fmt: skip
    loss, gradients = expected(case)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt().item()
    assert abs(result.loss - loss) <= TOLERANCE * loss, f"loss {result.loss}, expected {loss}"
    assert abs(result.grad_norm - norm) <= TOLERANCE * norm, f"norm {result.grad_norm}, expected {norm}"
    for place, found in result.grad_norms.items():
        there = torch.stack([g.square().sum() for name, g in gradients.items() if place_of(name) == place])
        assert abs(found - there.sum().sqrt().item()) <= TOLERANCE * found, f"norm of {place} is {found}"
    assert optimizer.kept.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (optimizer.kept[name].full_tensor() - gradient).norm() / gradient.norm()  # type: ignore[attr-defined]
        assert error <= TOLERANCE, f"gradient of {name} is off by {error}"
    formula = step_traffic(
        CONFIG, case.parallel, world_size=processes.size, micro_batches=case.micro_batches, compute_dtype=torch.float32
    )
    assert case.compile or traced.traffic() == formula, f"{traced.traffic()}, by formula {formula}"


def check_one_bad_process(processes: World) -> None:
    """What is not finite on the last process alone is skipped by all."""
    model = sharded_model(CONFIG, processes, compute_dtype=torch.float32, compile=False, seed=5)
    optimizer = build_optimizer(model, Optimizer(learning_rate=0.1))
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    if processes.rank == processes.size - 1:
        plain_loss = model.loss
        model.loss = lambda *inputs: plain_loss(*inputs) * torch.inf  # type: ignore[method-assign]
    micro_batches = share(Case(Parallel(), 1, False, False, ActivationCheckpointing()), processes)
    result = train_step(model, optimizer, micro_batches, processes, max_grad_norm=1.0)
    assert not result.stepped, "a process took the step"
    after = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "weights have changed"


def cases(size: int) -> list[Case]:
    """The matrix for this many processes."""
    layouts = [Parallel()]
    if size > 1:
        layouts += [Parallel(reduce="every"), Parallel(reshard_after_forward=False)]
        layouts += [Parallel(replicas=2), Parallel(replicas=2, reduce="every")]
    modes = [ActivationCheckpointing(mode=mode) for mode in ("none", "selective", "full")]
    data = list(itertools.product((1, 4), (False, True), (False, True)))
    matrix = [Case(layout, *rest, mode) for layout in layouts for rest in data for mode in modes]
    # What only a compiled block can do.
    budget = ActivationCheckpointing(mode="budget", budget=0.3)
    return [*matrix, *(Case(layout, *rest, budget, compile=True) for layout in layouts for rest in data)]


def main() -> int:
    """The number of failures."""
    failures = 0
    with world() as processes:
        torch.set_num_threads(1)
        matrix = cases(processes.size)
        for case in matrix:
            try:
                check(case, processes)
            except AssertionError as error:
                failures += 1
                print(f"rank {processes.rank}: {case}: {error}", flush=True)
        check_one_bad_process(processes)
        if processes.first and not failures:
            print(f"{len(matrix)} cases", flush=True)
    return failures


if __name__ == "__main__":
    try:
        sys.exit(min(main(), 100))
    except Exception:
        traceback.print_exc()
        sys.exit(101)
