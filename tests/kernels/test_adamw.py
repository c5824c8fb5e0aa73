"""What the contract cannot see of AdamW: bfloat16's roundings, many tensors in a table, and every refused argument."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.kernels.adamw import MultiTensor, Rule, Slot, adamw, reference
from tilewright.kernels.dispatch import use

kernel = importlib.import_module("tilewright.kernels.adamw")  # the package's attribute of that name is the function
Tensors = dict[str, torch.Tensor]
BFLOAT16 = torch.bfloat16


def tensors(*shape: int, dtype: torch.dtype = torch.float32, state: torch.dtype = torch.float32) -> Tensors:
    return {
        "param": torch.randn(shape).to(dtype),
        "grad": torch.randn(shape).to(dtype),
        "exp_avg": (torch.randn(shape) / 10).to(state),
        "exp_avg_sq": (torch.rand(shape) / 100).to(state),
    }


def joined(param: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """The float32 number of a bfloat16 one and its low bits, by the definition rather than by the code's shifts."""
    return (param.view(torch.int16).long() * 65536 + low_bits.long()).int().view(torch.float32)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_with_its_low_bits_kept_a_bfloat16_parameter_trains_as_a_float32_one_does_to_the_bit(mode: str) -> None:
    kept = tensors(3000, dtype=BFLOAT16)
    plain = {name: x.float() for name, x in kept.items()}
    low_bits = torch.zeros(3000, dtype=torch.int16)
    with use(mode):
        for step in range(1, 6):
            grad = torch.randn(3000).to(BFLOAT16)
            kept["grad"], plain["grad"] = grad, grad.float()
            *new, low_bits = adamw(**kept, low_bits=low_bits, step=step)
            kept = dict(zip(("param", "exp_avg", "exp_avg_sq"), new, strict=True))
            new = adamw(**plain, step=step)
            plain = dict(zip(("param", "exp_avg", "exp_avg_sq"), new, strict=True))
            assert torch.equal(joined(kept["param"], low_bits), plain["param"])
            assert torch.equal(kept["exp_avg_sq"], plain["exp_avg_sq"])
            # What the forward pass sees is as near as a bfloat16 number can be, not the next one towards zero.
            error, least = kept["param"].float() - plain["param"], plain["param"].to(BFLOAT16) - plain["param"]
            assert torch.equal(error.abs(), least.abs())
    assert low_bits.unique().numel() > 1000


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_stochastic_rounding_moves_by_a_tenth_of_the_spacing_on_average_where_nearest_never_moves(mode: str) -> None:
    count, spacing = 40_000, 2.0**-7
    still = {name: torch.zeros(count) for name in ("exp_avg", "exp_avg_sq")}
    param = torch.ones(count, dtype=BFLOAT16)
    options: dict[str, Any] = {"step": 1, "lr": spacing / 10, "weight_decay": 0.0, "maximize": True}
    with use(mode):
        nearest = adamw(param, param, **still, **options)[0]
        rounded = adamw(param, param, **still, **options, stochastic=True, seed=3)[0]
        other = adamw(param, param, **still, **options, stochastic=True, seed=4)[0]
        again = adamw(param, param, **still, **options, stochastic=True, seed=3)[0]
        down = adamw(-param, -param, **still, **options, stochastic=True, seed=3)[0]
    assert torch.equal(nearest, param)
    assert set(rounded.tolist()) == {1.0, 1.0 + spacing}
    # The first step is lr in size. Of 40,000 rounded one by one, the mean is within five standard deviations.
    fraction = (rounded.double() - 1).mean() / spacing
    assert abs(fraction - 0.1) < 5 * math.sqrt(0.1 * 0.9 / count)
    assert torch.equal(rounded, again)
    assert torch.equal(rounded, -down)
    both = ((rounded > 1) & (other > 1)).double().mean()  # another seed is independent: 0.1 · 0.1
    assert abs(both - 0.01) < 5 * math.sqrt(0.01 / count)


def test_neighbouring_elements_steps_and_tensors_are_rounded_independently() -> None:
    random = {
        (number, step): kernel._random(5, number, step, 0, torch.empty(20_000)) & 0xFFFF
        for number in (0, 1)
        for step in (1, 2)
    }

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack((a, b)).double())[0, 1])

    first = random[0, 1]
    others = [random[1, 1], random[0, 2], random[1, 2], first.roll(1), first.roll(4)]
    assert max(abs(correlation(first, other)) for other in others) < 5 / math.sqrt(20_000)
    assert abs(first.double().mean() / 65535 - 0.5) < 5 / math.sqrt(12 * 20_000)


@pytest.mark.parametrize("numel", [2048, 2047])
@pytest.mark.parametrize("state", [torch.float32, BFLOAT16])
def test_kernel_and_reference_round_with_the_same_random_bits(numel: int, state: torch.dtype) -> None:
    inputs = tensors(numel, dtype=BFLOAT16, state=state)
    options: dict[str, Any] = {"step": 9, "stochastic": True, "seed": 2**40 + 17}
    for ours, expected in zip(adamw(**inputs, **options), reference(**inputs, **options), strict=True):
        assert ours.dtype == expected.dtype
        # A unit in float32's last place may tip a few over; other random bits would tip a third.
        assert (ours != expected).double().mean() < 0.002


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_bfloat16_second_moment_decays_as_a_float32_one_does(mode: str) -> None:
    count, steps = (64, 120) if mode == "triton" else (4000, 700)
    zero, moment = torch.zeros(count), torch.ones(count, dtype=BFLOAT16)
    with use(mode):
        for step in range(1, steps + 1):
            _, _, moment = adamw(zero, zero, zero, moment, step=step)
    # Rounded to nearest it would still be 1.
    assert moment.double().mean() == pytest.approx(0.999**steps, rel=0.02)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_gradient_that_is_not_a_number_is_not_rounded_into_one(mode: str) -> None:
    for options in ({}, {"stochastic": True}, {"low_bits": torch.zeros(64, dtype=torch.int16)}):
        inputs = {**tensors(64, dtype=BFLOAT16, state=BFLOAT16), "grad": torch.randn(64)}
        inputs["grad"][5] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN of a GPU
        inputs["grad"][6] = math.inf
        with use(mode):
            param, exp_avg, exp_avg_sq, *_ = adamw(**inputs, step=1, **options)
        for x in (param, exp_avg, exp_avg_sq):
            assert x.isnan()[5]
            assert x[:5].isfinite().all()
            assert x[7:].isfinite().all()
        assert param.isnan()[6]
        assert exp_avg_sq[6] == math.inf


def slots_of(inputs: list[Tensors], **options: Any) -> tuple[list[Slot], list[torch.Tensor]]:
    slots = [
        Slot(x["param"], x["exp_avg"], x["exp_avg_sq"], None, torch.zeros(()), number=number, **options)
        for number, x in enumerate(inputs)
    ]
    return slots, [x["grad"] for x in inputs]


RULE = Rule(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, stochastic=True, seed=11)


def test_tensors_of_any_length_alignment_and_dtype_step_together_as_each_does_alone() -> None:
    inputs = [
        tensors(numel, dtype=dtype, state=state)
        for numel in (0, 1, 7, 127, 1000, 4097)
        for dtype, state in ((torch.float32, torch.float32), (BFLOAT16, BFLOAT16), (torch.float16, torch.float32))
    ]
    odd = {name: x[1:] for name, x in tensors(1001).items()}  # 4 bytes past a multiple of 16
    inputs.append(odd)
    inputs.append({**tensors(64), "grad": torch.randn(64).to(BFLOAT16)})  # a gradient in another dtype
    expected = [
        reference(**x, step=1, lr=0.1, stochastic=x["param"].dtype == BFLOAT16, seed=11, number=number)
        for number, x in enumerate(inputs)
    ]
    slots, grads = slots_of(inputs)
    MultiTensor(slots, grads)(grads, RULE)
    for slot, (param, exp_avg, exp_avg_sq) in zip(slots, expected, strict=True):
        assert slot.step == 1
        for ours, theirs in ((slot.param, param), (slot.exp_avg, exp_avg), (slot.exp_avg_sq, exp_avg_sq)):
            unit = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=2 * unit, atol=unit)
            assert ours.numel() == 0 or (ours != theirs).double().mean() < 0.5


def test_wide_loads_are_made_only_where_memory_and_length_allow_them() -> None:
    """The interpreter does not look at the promises on which the compiler builds its wide loads."""
    base = tensors(4096, dtype=BFLOAT16)

    def wide(start: int = 0, last: int = 4096, grad: int = 0, **options: Any) -> bool:
        part = {name: x[start:last] for name, x in base.items()}
        part["grad"] = base["grad"][grad : grad + last - start]
        slots, grads = slots_of([part], **options)
        ((kind, *_),) = MultiTensor(slots, grads).launches
        return kind.vectors

    assert wide()
    assert wide(8, 4096, 8)
    assert wide(8, 16, 16)
    assert wide(first=4)
    assert not wide(first=2)  # four elements share random bits
    assert not wide(last=4095)
    assert not wide(last=4092)  # four elements of 16 bits are 8 bytes
    assert not wide(4, 12, 0)
    assert not wide(0, 8, 1)


def test_parts_of_a_tensor_are_rounded_as_the_whole_wherever_it_is_cut() -> None:
    whole = tensors(1000, dtype=BFLOAT16, state=BFLOAT16)
    expected = reference(**whole, step=1, lr=0.1, stochastic=True, seed=11)
    parts = []
    for first, last in ((0, 400), (400, 403), (403, 411), (411, 1000)):
        (slot,), grads = slots_of([{name: x[first:last].clone() for name, x in whole.items()}], first=first)
        MultiTensor([slot], grads)(grads, RULE)
        parts.append(slot)
    together = torch.cat([slot.param for slot in parts])
    assert (together != expected[0]).double().mean() < 0.005


def test_elements_past_two_to_the_31_are_addressed_rightly(tmp_path: Path) -> None:
    numel, last = 2**31 + 4096, 2048

    def far(name: str, dtype: torch.dtype) -> torch.Tensor:
        """In a sparse file, which fills no disk."""
        storage = torch.UntypedStorage.from_file(str(tmp_path / name), True, numel * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, 0, (numel,), (1,))

    near = tensors(last, dtype=BFLOAT16, state=BFLOAT16)
    inputs = {name: far(name, x.dtype) for name, x in near.items()}
    for name, x in near.items():
        inputs[name][-last:] = x
    expected = reference(**near, step=1, lr=0.1, stochastic=True, seed=11, first=numel - last)
    slots, grads = slots_of([inputs])
    stepper = MultiTensor(slots, grads)
    # A million programs are too many for the interpreter: the last block's alone, by its entry in the table.
    ((kind, configuration, blocks),) = stepper.launches
    assert blocks[-1].tolist() == [0, numel // 2048 - 1]
    stepper.launches = [(kind, configuration, blocks[-1:].contiguous())]
    stepper(grads, RULE)
    for ours, theirs in zip((slots[0].param, slots[0].exp_avg, slots[0].exp_avg_sq), expected, strict=True):
        assert (ours[-last:] != theirs).double().mean() < 0.005


def test_each_byte_is_read_once_and_written_once(issued: Callable[[], int]) -> None:
    for dtype, state in ((torch.float32, torch.float32), (BFLOAT16, BFLOAT16)):
        inputs = tensors(16 * 2048, dtype=dtype, state=state)
        adamw(**inputs, step=1)
        compulsory = 2 * sum(x.nbytes for x in inputs.values()) - inputs["grad"].nbytes
        assert 1.0 <= issued() / compulsory <= 1.005


def test_a_clip_tensor_scales_the_gradient_as_it_is_read() -> None:
    inputs = tensors(300)
    clipped = adamw(**inputs, step=1, clip=torch.tensor([0.25]))
    scaled = adamw(**{**inputs, "grad": inputs["grad"] * 0.25}, step=1)
    assert all(torch.equal(a, b) for a, b in zip(clipped, scaled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(adamw(**inputs, step=1, clip=0.25), scaled, strict=True))


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_no_gradient_flows_through_a_step(mode: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors(16).items()}
    with use(mode):
        assert not any(x.requires_grad for x in adamw(**inputs, step=1))


ONE = torch.ones(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.ones(5)}, r"grad has shape \(5,\); it must be \(4,\), the shape of param"),
        ({"exp_avg_sq": torch.ones(2, 2)}, r"exp_avg_sq has shape \(2, 2\)"),
        ({"param": torch.ones(4, dtype=torch.int64)}, r"param has dtype torch.int64"),
        ({"exp_avg": ONE.half()}, r"exp_avg has dtype torch.float16, which underflows; it must be float32 or bfloat16"),
        ({"exp_avg": ONE.double()}, r"dtype torch.float64.*; convert one to the other|dtype torch.float32"),
        ({"grad": torch.ones(4, device="meta")}, r"grad is on meta and param on cpu"),
        (
            {"low_bits": torch.zeros(4, dtype=torch.int16)},
            r"low_bits .* param torch.float32; they must be int16 and bflo",
        ),
        (
            {"param": ONE.bfloat16(), "low_bits": torch.zeros(4, dtype=torch.int16), "stochastic": True},
            r"stochastic is True and low_bits are given",
        ),
        ({"param": ONE.half(), "stochastic": True}, r"stochastic is True and param has dtype torch.float16"),
        ({"step": 0}, r"step is 0; it must be at least 1"),
        ({"lr": -1.0}, r"lr is -1.0; it must be at least 0"),
        ({"lr": math.nan}, r"lr is nan; it must be at least 0"),
        ({"eps": -1e-8}, r"eps is -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers, each at least 0 and less than 1"),
        ({"seed": -1}, r"seed is -1"),
        ({"clip": torch.ones(2)}, r"clip has shape \(2,\) .*; it must be one number"),
        ({"clip": torch.ones((), device="meta")}, r"clip is on meta and param on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"param": ONE, "grad": ONE, "exp_avg": ONE, "exp_avg_sq": ONE, "step": 1, **changes}
    with pytest.raises(ValueError, match=message):
        adamw(**arguments)
