"""Two processes that hold half of the classes each find the loss and the gradient that one finds with all of them.

Run as a program, this file is one of the two: ``test_vocabulary_parallel.py RANK FOLDER`` computes every case and
leaves what it found in the folder, where the tests compare it with the unsharded reference.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed

from tilewright.kernels.cross_entropy import cross_entropy, losses_and_gradient, reference
from tilewright.kernels.dispatch import use

RANKS = 2
ROWS = 6
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "ignore_index": 7},
]
REDUCTIONS = ("mean", "sum", "none")
# Implementation, dtype, classes: shards of an odd width, and of several blocks.
KINDS = [
    ("triton", torch.float32, 70),
    ("triton", torch.float16, 70),
    ("triton", torch.float32, 10002),
    ("reference", torch.float32, 70),
    ("reference", torch.float64, 70),
]
CASES = list(itertools.product(KINDS, OPTIONS, REDUCTIONS))


def inputs(
    kind: tuple[str, torch.dtype, int], options: dict[str, Any], reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of all classes (2, 3, classes), targets, of which one is ignored, and the upstream gradient."""
    _, dtype, classes = kind
    torch.manual_seed(1)
    targets = torch.randint(8, classes, (2, 3))
    targets[0, 0], targets[1, 2] = 9, classes - 1  # one in each shard
    targets[0, 1] = options.get("ignore_index", -100)
    logits = (3 * torch.randn(2, 3, classes)).to(dtype)
    return logits, targets, torch.randn((2, 3) if reduction == "none" else ())


def shard(logits: torch.Tensor, rank: int) -> torch.Tensor:
    return logits.chunk(RANKS, -1)[rank].detach().requires_grad_()


def found_by_rank(rank: int) -> dict[str, Any]:
    group = distributed.group.WORLD
    calls: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *rest)

    distributed.all_reduce = counted
    results = []
    for kind, options, reduction in CASES:
        logits, targets, upstream = inputs(kind, options, reduction)
        part = shard(logits, rank)
        calls.clear()
        with use(kind[0]):
            loss, z_loss = cross_entropy(part, targets, reduction=reduction, group=group, return_z_loss=True, **options)
            (first,) = torch.autograd.grad(loss, part, upstream.to(loss.dtype), retain_graph=True)
            (second,) = torch.autograd.grad(loss, part, upstream.to(loss.dtype))
        results.append((loss.detach(), z_loss, first, torch.equal(first, second), tuple(calls)))
    found: dict[str, Any] = {"cases": results, "chunks": [], "overwritten": [], "padded": [], "errors": {}}

    for implementation in ("triton", "reference"):
        with use(implementation):
            logits, targets, _ = inputs(KINDS[0], OPTIONS[-1], "none")
            part, flat = shard(logits, rank).detach().reshape(ROWS, -1), targets.reshape(-1)
            flat[3] = 70  # no class
            arguments = {**OPTIONS[-1], "group": group, "overwrite": True}
            chunk = part.clone()
            found["chunks"].append(losses_and_gradient(chunk, flat, torch.arange(6.0), **arguments))
            found["overwritten"].append(not torch.equal(chunk, part))

            # The second rank holds nothing but padding.
            masked = torch.randn(4, 20).masked_fill(torch.tensor(rank == 1), -torch.inf).requires_grad_()
            loss = cross_entropy(masked, torch.arange(4), group=group)
            found["padded"].append((loss.detach(), *torch.autograd.grad(loss, masked), masked.detach()))

    def error(name: str, call: Any) -> None:
        try:
            call()
            found["errors"][name] = "none"
        except (ValueError, RuntimeError) as raised:
            found["errors"][name] = f"{type(raised).__name__}: {raised}"

    part, targets = torch.randn(3, 20, requires_grad=True), torch.tensor([0, 25, 39])
    for implementation in ("triton", "reference"):
        with use(implementation):
            error(f"widths, {implementation}", lambda: cross_entropy(torch.randn(3, 20 + rank), targets, group=group))
            error(
                f"second derivative, {implementation}",
                lambda: torch.autograd.grad(cross_entropy(part, targets, group=group), part, create_graph=True),
            )
    error("target", lambda: cross_entropy(part, targets + 1, group=group))
    alone = distributed.new_group([0])
    error("member", lambda: cross_entropy(part, torch.tensor([0, 1, 19]), group=alone))
    return found


def main(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(found_by_rank(rank), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(RANKS)]
    processes = [
        subprocess.Popen(command, env=os.environ.copy(), stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=[
        f"{kind[0]}-{str(kind[1])[6:]}-{kind[2]}-{'-'.join(options) or 'plain'}-{reduction}"
        for kind, options, reduction in CASES
    ],
)
def test_sharded_classes_give_the_loss_and_gradient_of_whole_rows(found: list[dict[str, Any]], number: int) -> None:
    kind, options, reduction = CASES[number]
    logits, targets, upstream = inputs(kind, options, reduction)
    whole = logits.double().requires_grad_()
    expected = reference(whole, targets, reduction=reduction, return_z_loss=True, **options)
    (gradient,) = torch.autograd.grad(expected[0], whole, upstream.double())
    results = [rank["cases"][number] for rank in found]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind[1] != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    for loss, z_loss, _, repeats, _ in results:
        torch.testing.assert_close(loss.double(), expected[0].detach(), **tolerance)
        torch.testing.assert_close(z_loss.double(), expected[1].detach(), **tolerance)
        assert repeats
    assert torch.equal(results[0][0], results[1][0])
    got = torch.cat([result[2] for result in results], -1)
    assert got.dtype == kind[1]
    if kind[1] == torch.float16:
        tolerance = {"rtol": 2**-10, "atol": 2**-24}
    torch.testing.assert_close(got.double(), gradient, **tolerance)


def test_a_call_takes_two_small_collectives_whatever_the_classes(found: list[dict[str, Any]]) -> None:
    """The forward pass's: the maxima with two numbers that compare the shards' widths, and the sums."""
    assert {result[4] for rank in found for result in rank["cases"]} == {(ROWS + 2, 3 * ROWS)}


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_chunks_of_a_sharded_head_have_the_losses_and_the_gradient_of_whole_rows(
    found: list[dict[str, Any]], implementation: str
) -> None:
    number = ["triton", "reference"].index(implementation)
    logits, targets, _ = inputs(KINDS[0], OPTIONS[-1], "none")
    whole, flat = logits.reshape(ROWS, -1).requires_grad_(), targets.reshape(-1)
    expected = reference(whole, flat, reduction="none", return_z_loss=True, **OPTIONS[-1])
    (gradient,) = torch.autograd.grad(expected[0], whole, torch.arange(6.0))
    classes = torch.tensor([0, 1, 2, 4, 5])  # the rows whose target is a class
    for rank in found:
        losses, z_losses, _ = rank["chunks"][number]
        torch.testing.assert_close(losses[classes], expected[0][classes].detach())
        torch.testing.assert_close(z_losses[classes], expected[1][classes].detach())
        assert losses[3].isnan()
        assert rank["overwritten"] == [True, False]
    got = torch.cat([rank["chunks"][number][2] for rank in found], -1)
    torch.testing.assert_close(got[classes], gradient[classes])


@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_that_is_all_padding_takes_no_part(found: list[dict[str, Any]], number: int) -> None:
    loss, gradient, logits = found[0]["padded"][number]
    logits.requires_grad_()
    expected = reference(logits, torch.arange(4))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert torch.count_nonzero(found[1]["padded"][number][1]) == 0


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_shards_of_different_widths_are_refused_on_every_rank(found: list[dict[str, Any]], implementation: str) -> None:
    for rank in (0, 1):
        assert found[rank]["errors"][f"widths, {implementation}"] == (
            f"ValueError: cross_entropy: this rank of group holds {20 + rank} classes and others hold 20 to 21; "
            "every rank must hold the same number"
        )


def test_what_a_group_does_not_allow_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["errors"]["target"].startswith(
            "ValueError: cross_entropy: targets holds 40; each must be a class from 0 to 39"
        )
        for implementation in ("triton", "reference"):
            assert "no second derivatives" in rank["errors"][f"second derivative, {implementation}"]
    assert found[0]["errors"]["member"] == "none"
    assert "must be a torch.distributed.ProcessGroup, or None" in found[1]["errors"]["member"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
