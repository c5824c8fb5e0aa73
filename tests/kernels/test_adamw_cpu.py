"""AdamW's step in C++: to the bit what the reference computes, with square roots that are rounded correctly.

PyTorch's own square root is now and then off by a unit in the last place; the reference gets NumPy's here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tilewright.kernels import adamw_cpu, optim
from tilewright.kernels.adamw import Rule, Slot, reference
from tilewright.kernels.dispatch import use

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
RULE = Rule(lr=0.013, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, scale=0.3, seed=12345678901)


@pytest.fixture(autouse=True)
def exact_square_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


@pytest.fixture(autouse=True)
def off_triton() -> Iterator[None]:
    with use("auto"):
        yield


def slot_of(numel: int, dtypes: tuple[torch.dtype, ...], *, low_bits: bool = False, first: int = 0) -> Slot:
    param, exp_avg, exp_avg_sq = torch.randn(numel), torch.randn(numel) / 10, torch.rand(numel) / 100
    kept = (x.to(dtype) for x, dtype in zip((param, exp_avg, exp_avg_sq), dtypes, strict=True))
    low = torch.randint(-(2**15), 2**15, (numel,)).to(torch.int16) if low_bits else None
    return Slot(*kept, low, torch.tensor(7.0), number=3, first=first)


def expected(slot: Slot, grad: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, ...]:
    return reference(
        slot.param, grad, slot.exp_avg, slot.exp_avg_sq, step=int(slot.step), lr=float(rule.lr),
        betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay, clip=rule.scale,
        low_bits=slot.low_bits, stochastic=rule.stochastic, seed=rule.seed, number=slot.number, first=slot.first,
    )  # fmt: skip


def bits(x: torch.Tensor) -> torch.Tensor:
    # One pattern for every NaN.
    x = torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x
    return x.view({4: torch.int32, 2: torch.int16}[x.itemsize])


def check(slot: Slot, grad: torch.Tensor, rule: Rule) -> None:
    new = expected(slot, grad, rule)
    assert adamw_cpu.serves(slot, grad)
    adamw_cpu.step([(slot, grad)], rule)
    for result, right in zip((x for x in slot.tensors() if x is not None), new, strict=True):
        torch.testing.assert_close(bits(result), bits(right), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("param", "rounding"),
    [(FLOAT32, "nearest"), (BFLOAT16, "nearest"), (BFLOAT16, "stochastic"), (BFLOAT16, "low bits")],
)
def test_every_combination_of_dtypes(param: torch.dtype, rounding: str) -> None:
    for grad, exp_avg, exp_avg_sq in itertools.product((FLOAT32, BFLOAT16), repeat=3):
        slot = slot_of(1000, (param, exp_avg, exp_avg_sq), low_bits=rounding == "low bits")
        check(slot, torch.randn(1000).to(grad), RULE._replace(stochastic=rounding == "stochastic"))


@pytest.mark.parametrize("numel", [0, 1, 3, 63, 64, 65, 70_001])
@pytest.mark.parametrize("first", [0, 1, 5, 64, 130, 2**34 + 7])
def test_every_size_and_place_of_a_shard(numel: int, first: int) -> None:
    """The random bits are those of the element's place in the whole tensor."""
    slot = slot_of(numel, (BFLOAT16, FLOAT32, BFLOAT16), first=first)
    check(slot, torch.randn(numel), RULE._replace(stochastic=True))


def test_numbers_that_are_none() -> None:
    grad = torch.randn(200)
    grad[3], grad[70], grad[130] = torch.nan, torch.inf, -torch.inf
    for dtype in (FLOAT32, BFLOAT16):
        check(slot_of(200, (dtype,) * 3), grad, RULE._replace(stochastic=True))


def test_many_tensors_on_any_number_of_threads() -> None:
    def stepped(threads: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        slots = [slot_of(numel, (FLOAT32, BFLOAT16, BFLOAT16)) for numel in (100_000, 5, 0, 70_000)]
        grads = [torch.randn(slot.param.numel()) for slot in slots]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            adamw_cpu.step(list(zip(slots, grads, strict=True)), RULE)
        finally:
            torch.set_num_threads(before)
        return [x for slot in slots for x in slot.tensors() if x is not None]

    for one, several in zip(stepped(1), stepped(3), strict=True):
        torch.testing.assert_close(bits(one), bits(several), rtol=0, atol=0)


@pytest.mark.parametrize("rounding", ["stochastic", "low bits"])
@pytest.mark.parametrize("maximize", [True, False])
def test_the_optimizer_steps_as_in_plain_pytorch(rounding: str, maximize: bool) -> None:
    def stepped(implementation: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        numel = optim._CHUNK + 100  # plain PyTorch takes it in two parts
        parameters = [torch.randn(numel, dtype=dtype, requires_grad=True) for dtype in (BFLOAT16, FLOAT32)]
        optimizer = optim.AdamW(
            parameters, 0.01, rounding=rounding, state_dtype=BFLOAT16, maximize=maximize, implementation=implementation
        )
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(numel).to(parameter.dtype)
            optimizer.step(clip=torch.tensor(0.7))
        return [x for p in parameters for x in (p.detach(), *optimizer.state[p].values())]

    for with_it, without in zip(stepped("auto"), stepped("reference"), strict=True):
        torch.testing.assert_close(bits(with_it), bits(without), rtol=0, atol=0)


def test_what_it_does_not_serve() -> None:
    with use("reference"):
        assert not adamw_cpu.serves(slot_of(10, (FLOAT32, BFLOAT16, BFLOAT16)), torch.randn(10))
    slot = slot_of(10, (torch.float16, FLOAT32, FLOAT32))
    assert not adamw_cpu.serves(slot, torch.randn(10))
    assert not adamw_cpu.serves(slot_of(10, (FLOAT32,) * 3), torch.randn(10, dtype=torch.float64))
