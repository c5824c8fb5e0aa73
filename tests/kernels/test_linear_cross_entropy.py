"""What the contract cannot see of the fused head: that it works in chunks, and what it never holds."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.kernels.dispatch import use
from tilewright.kernels.linear_cross_entropy import _CHUNK_ELEMENTS, chunk_rows, linear_cross_entropy, reference

ROWS, WIDTH, CLASSES = 300, 16, 61


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 rows at a time: two whole chunks and a part of one."""
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 128 * CLASSES)
    assert chunk_rows(CLASSES, torch.device("cpu")) == 128


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH)
    targets = torch.randint(CLASSES, (ROWS,))
    targets[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("small_chunks")
def test_chunks_add_up_to_the_loss_of_all_logits(implementation: str, reduction: str) -> None:
    hidden, weight, targets = head()
    expected = reference(hidden, weight, targets, reduction=reduction, label_smoothing=0.1)
    upstream = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight), upstream)
    with use(implementation):
        got = linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=0.1)
        gradients = torch.autograd.grad(got, (hidden, weight), upstream)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients, expected_gradients)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor with a dimension of CLASSES or more rows had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[-1] == CLASSES:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small_chunks")
def test_the_logits_of_the_whole_batch_never_exist(implementation: str, reduction: str) -> None:
    hidden, weight, targets = head()
    with use(implementation), LargestTensor() as seen:
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        loss.sum().backward()
    assert seen.elements == 128 * CLASSES


def test_weight_gradients_in_half_precision_are_summed_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks that each add little: in bfloat16 the later ones would round away."""
    rows, width, classes = 64 * 128, 4, 5
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 1)
    hidden = torch.ones(rows, width, dtype=torch.bfloat16)
    weight = torch.zeros(classes, width, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with use("reference"):
        linear_cross_entropy(hidden, weight, targets, reduction="sum").backward()
    # Every row adds 1/5 to each other class: exactly rows / 5, up to bfloat16's rounding of 0.2 and of the result.
    torch.testing.assert_close(weight.grad[1].double(), torch.full((width,), rows * 0.2).double(), rtol=2**-7, atol=0)


def test_a_loss_that_needs_no_gradient_computes_none() -> None:
    hidden, weight, targets = head()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, reference(hidden, weight, targets).detach())
    assert not loss.requires_grad


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_loss_scaling_saves_small_float16_gradients(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over many rows makes gradients that float16 cannot resolve, unless the upstream scale comes first."""
    rows, width, classes, scale = 2048, 8, 64, 65536.0
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 1024 * classes)
    hidden = torch.randn(rows, width).half().requires_grad_()
    weight = torch.randn(classes, width).half().requires_grad_()
    targets = torch.randint(classes, (rows,))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(reference(*wide, targets), wide, torch.tensor(scale, dtype=torch.float64))
    with use(implementation):
        loss = linear_cross_entropy(hidden, weight, targets)
        got = torch.autograd.grad(loss, (hidden, weight), torch.tensor(scale))
    for gradient, expected in zip(got, exact, strict=True):
        assert (gradient.double() - expected).norm() / expected.norm() < 1e-3
