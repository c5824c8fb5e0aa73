"""Heads whose weight is spread over processes, by FSDP or by vocabulary: two of them over gloo against one alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tilewright.kernels import linear_cross_entropy, linear_kl, linear_logprob, use

PROCESSES = 2
ROWS, WIDTH, CLASSES = 10, 8, 37  # 37: the shards are not alike
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0, "return_z_loss": True}
Results = dict[str, Any]


class TiedModel(nn.Module):
    """An embedding that is a head too, and a head of its own that no forward ever calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(self.embedding(tokens)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of all processes together; each takes an equal part of the rows."""
    generator = torch.Generator().manual_seed(2)
    tokens, targets = torch.randint(CLASSES, (2, PROCESSES * ROWS), generator=generator)
    return tokens, targets


def losses(model: TiedModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The tied weight and the head's, each outside of the forward that FSDP wraps, through every op."""
    hidden = model(tokens)
    tied = linear_cross_entropy(hidden, model.embedding.weight, targets, z_loss=1e-2)
    own = linear_logprob(hidden, model.head.weight, targets, bias=model.head.bias).mean()
    distance = linear_kl(hidden, model.head.weight, hidden.roll(1, -1), model.embedding.weight, bias=model.head.bias)
    assert isinstance(tied, torch.Tensor)
    return tied - own + distance


def train(model: TiedModel, rank: int, processes: int) -> Results:
    part = slice(rank * (PROCESSES * ROWS) // processes, (rank + 1) * (PROCESSES * ROWS) // processes)
    tokens, targets = (x[part] for x in batch())
    for _ in range(2):  # the second adds to what the first left
        loss = losses(model, tokens, targets)
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor) == isinstance(parameter, DTensor)
        if isinstance(gradient, DTensor):
            assert gradient.placements == parameter.placements
            assert gradient.dtype == parameter.dtype
            gradient = gradient.full_tensor()
        gradients[name] = gradient
    return {"loss": loss.detach(), "gradients": gradients}


def shard_by_fsdp(policy: MixedPrecisionPolicy) -> TiedModel:
    model = TiedModel()
    for module in (model.mix, model.head, model):
        # Resharded after forward, so that the weights stand sharded where the losses read them.
        fully_shard(module, reshard_after_forward=True, mp_policy=policy)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def head() -> dict[str, torch.Tensor]:
    """The inputs of one head, whole; two processes take 19 of its 38 classes each."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (38, WIDTH), (38,)))
    targets = torch.randint(38, (ROWS,), generator=generator)
    targets[::4] = -100
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}


def split_head(reduction: str, rank: int, processes: int, group: Any, compiled: bool = False) -> list[torch.Tensor]:
    """Loss, z-loss, and the gradients of hidden and of this process's weight and bias."""
    tensors = head()
    for name in ("weight", "bias"):
        tensors[name] = tensors[name].chunk(processes)[rank]
    inputs = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    function = (
        torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager") if compiled else linear_cross_entropy
    )
    loss, z_loss = function(**tensors, reduction=reduction, group=group, **ALL_OPTIONS)
    upstream = torch.linspace(-1.0, 2.0, ROWS) if reduction == "none" else torch.tensor(0.7)
    return [loss.detach(), z_loss, *torch.autograd.grad(loss, inputs, upstream)]


def refused(group: Any, rank: int) -> str:
    tensors = head()
    del tensors["bias"]
    tensors["weight"] = tensors["weight"][: 10 + rank]
    tensors["targets"].fill_(-100)
    try:
        linear_cross_entropy(**tensors, group=group)
    except ValueError as error:
        return str(error)
    return "accepted"


def work(rank: int, folder: Path) -> None:
    """What one of the processes does; its results lie in the folder afterwards."""
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    results: Results = {"float32": train(shard_by_fsdp(MixedPrecisionPolicy()), rank, PROCESSES)}
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results["bfloat16"] = train(shard_by_fsdp(mixed), rank, PROCESSES)
    group = dist.group.WORLD
    for implementation in ("triton", "reference"):
        with use(implementation):
            for reduction in ("mean", "sum", "none"):
                results[implementation, reduction] = split_head(reduction, rank, PROCESSES, group)
            results[implementation, "compiled"] = split_head("mean", rank, PROCESSES, group, compiled=True)
    results["refused"] = refused(group, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(PROCESSES)]
    assert [process.wait(timeout=300) for process in started] == [0] * PROCESSES
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_a_sharded_weight_gets_the_gradient_of_the_whole_batch(both: list[Results]) -> None:
    """A tied embedding, used inside FSDP's forward and outside, and a head that is only used outside."""
    with use("reference"):
        alone = train(TiedModel(), 0, 1)
    mean_loss = torch.stack([one["float32"]["loss"] for one in both]).mean()
    torch.testing.assert_close(mean_loss, alone["loss"])
    for one in both:
        for name, gradient in one["float32"]["gradients"].items():
            torch.testing.assert_close(
                gradient, alone["gradients"][name], msg=lambda text, name=name: f"{name}: {text}"
            )


def test_under_mixed_precision_the_weight_is_gathered_in_the_compute_dtype(both: list[Results]) -> None:
    for one in both:
        exact, rounded = one["float32"]["gradients"], one["bfloat16"]["gradients"]
        for name in exact:
            assert rounded[name].dtype == torch.float32
            error = (rounded[name] - exact[name]).norm() / exact[name].norm()
            assert 1e-5 < error < 2e-2, name  # rounded to 8 bits, and no more than that


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "compiled"])
def test_a_head_split_by_vocabulary_gives_the_numbers_of_the_whole_one(
    both: list[Results], implementation: str, reduction: str
) -> None:
    with use(implementation):
        loss, z_loss, *gradients = split_head("mean" if reduction == "compiled" else reduction, 0, 1, None)
    for rank, one in enumerate(both):
        got_loss, got_z_loss, *got = one[implementation, reduction]
        torch.testing.assert_close((got_loss, got_z_loss), (loss, z_loss))
        torch.testing.assert_close(got[0], gradients[0], msg=lambda text: f"hidden: {text}")
        for whole, part in zip(gradients[1:], got[1:], strict=True):
            torch.testing.assert_close(part, whole.chunk(PROCESSES)[rank])


def test_shards_of_different_sizes_are_refused(both: list[Results]) -> None:
    assert [one["refused"] for one in both] == [
        f"linear_cross_entropy: this rank of group holds {width} classes and others hold 10 to 11; "
        "every rank must hold the same number"
        for width in (10, 11)
    ]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
