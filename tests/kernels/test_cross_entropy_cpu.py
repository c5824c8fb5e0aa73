"""Rows of logits in C++: losses and gradients against float64, beside plain PyTorch's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from tilewright.kernels import cross_entropy_cpu, linear_cross_entropy
from tilewright.kernels.cross_entropy import losses_and_gradient
from tilewright.kernels.dispatch import use

plain_rows = importlib.import_module("tilewright.kernels.cross_entropy")._plain_rows  # the name is the function's too


@pytest.fixture(autouse=True)
def off_triton() -> Iterator[None]:
    with use("auto"):
        yield


def rows(count: int, classes: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(classes)
    targets = torch.randint(classes, (count,))
    targets[::5] = -100
    return (spread * torch.randn(count, classes)).to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 7, 63, 64, 65, 127, 1000, 4097, 32000])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.1, 1e-3)])
@pytest.mark.parametrize("spread", [3.0, 40.0])
def test_errors_are_those_of_plain_pytorch(
    dtype: torch.dtype, classes: int, label_smoothing: float, z_loss: float, spread: float
) -> None:
    logits, targets = rows(20, classes, dtype, spread)
    upstream = torch.rand(20)
    assert cross_entropy_cpu.serves(logits, 0.0)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    ours = losses_and_gradient(logits, targets, upstream, **options)
    plain = plain_rows(logits, targets, upstream, (-100, label_smoothing, z_loss, 0.0), torch.empty_like(logits))
    exact = losses_and_gradient(logits.double(), targets, upstream.double(), **options)
    for name, mine, theirs, right in zip(("losses", "z-losses", "gradient"), ours, plain, exact, strict=True):
        assert mine is not None
        assert theirs is not None
        assert right is not None
        assert mine.dtype == theirs.dtype
        floor = 4 * torch.finfo(torch.float32).eps * float(right.abs().max())  # both may be right to the last bit
        error, allowed = (float((x.double() - right).abs().max()) for x in (mine, theirs))
        assert error <= 2 * allowed + floor, name


def test_small_probabilities_have_all_their_digits() -> None:
    """The gradient of a class that is not the target is its probability: exp(z) beside a class of logit 0."""
    below = -87 * torch.rand(50_000).sort().values
    logits = torch.stack([torch.zeros_like(below), below], 1)
    _, _, gradient = losses_and_gradient(logits, torch.zeros(50_000, dtype=torch.int64), torch.ones(50_000))
    assert gradient is not None
    exact = torch.softmax(logits.double(), -1)[:, 1]
    assert float(((gradient[:, 1] - exact) / exact).abs().max()) < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    logits, targets = rows(30, 1000, dtype)
    upstream = torch.ones(()).expand(30)
    *losses, apart = losses_and_gradient(logits, targets, upstream)
    before = logits.clone()
    *again, over = losses_and_gradient(logits, targets, upstream, overwrite=True)
    assert over is logits
    assert not torch.equal(logits, before)
    assert apart is not None
    assert torch.equal(apart, logits)
    assert all(torch.equal(x, y) for x, y in zip(losses, again, strict=True))


def test_rows_apart_in_memory_and_upstreams_of_any_stride() -> None:
    logits, targets = rows(30, 1000, torch.bfloat16)
    upstream = torch.rand(30)
    right = losses_and_gradient(logits, targets, upstream)
    gaps = torch.randn(30, 1400).bfloat16()
    gaps[:, 200:1200] = logits
    strided = torch.empty(60)[::2].copy_(upstream)
    for result, same in zip(losses_and_gradient(gaps[:, 200:1200], targets, strided), right, strict=True):
        assert result is not None
        assert same is not None
        assert torch.equal(result, same)
    transposed = logits.t().contiguous().t()
    for result, same in zip(losses_and_gradient(transposed, targets, upstream), right, strict=True):
        assert result is not None
        assert same is not None
        torch.testing.assert_close(result, same)


def test_rows_that_do_not_count_are_not_read() -> None:
    logits, targets = rows(10, 100, torch.float32)
    logits[targets == -100] = torch.nan
    losses, _, gradient = losses_and_gradient(logits, targets, torch.ones(10))
    assert gradient is not None
    assert torch.equal(losses[targets == -100], torch.zeros(2))
    assert not gradient[targets == -100].any()
    assert not gradient.isnan().any()


def test_a_row_with_what_is_no_number_has_no_loss_and_the_others_have() -> None:
    logits, targets = rows(6, 200, torch.float32)
    logits[1, 150], logits[2, 199], logits[3, :190] = torch.nan, torch.inf, -torch.inf
    targets[:] = 195
    targets[4] = 200  # no class
    losses, _, gradient = losses_and_gradient(logits, targets, torch.ones(6))
    assert gradient is not None
    assert losses.isnan().tolist() == [False, True, True, False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, True, False, False, False]
    assert not gradient[3, :190].any()


def test_compiled_code_computes_the_same_as_eager_code() -> None:
    hidden, weight = (torch.randn(n, 32).bfloat16().requires_grad_() for n in (70, 300))
    targets = torch.randint(300, (70,))

    def gradients(function: object) -> list[torch.Tensor]:
        loss = function(hidden, weight, targets)  # type: ignore[operator]
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for x, y in zip(gradients(compiled), gradients(linear_cross_entropy), strict=True):
        assert torch.equal(x, y)
