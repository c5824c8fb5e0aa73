"""What the contract cannot see of the fused head: that it works in chunks, what it never holds, and what it refuses."""

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from tilewright.kernels import linear_chunks
from tilewright.kernels.dispatch import use
from tilewright.kernels.linear_chunks import _CHUNK_ELEMENTS, chunk_rows
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy, reference

# The package's attribute of that name is the function.
linear_cross_entropy_module = importlib.import_module("tilewright.kernels.linear_cross_entropy")
ROWS, WIDTH, CLASSES = 40, 16, 61
both_implementations = pytest.mark.parametrize("implementation", ["triton", "reference"])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows at a time: two whole chunks and a part of one."""
    for module in (linear_chunks, linear_cross_entropy_module):
        monkeypatch.setattr(module, "chunk_rows", lambda classes, device: 16)


def test_chunks_are_bounded_whatever_the_vocabulary() -> None:
    rows = {classes: chunk_rows(classes, torch.device("cpu")) for classes in (1, 1000, 32000, 262144)}
    assert rows == {1: 1 << 24, 1000: 16384, 32000: 512, 262144: 128}
    assert chunk_rows(262144, torch.device("cuda")) == 1024


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH)
    targets = torch.randint(CLASSES, (ROWS,))
    targets[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@both_implementations
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


@pytest.fixture
def live_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Watches the products that make logits: how many there were, and the most elements alive at once."""
    chunks: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def linear(*args: Any) -> torch.Tensor:
        nonlocal most
        logits = F.linear(*args)
        chunks.append(weakref.ref(logits))
        most = max(most, sum(x.numel() for chunk in chunks if (x := chunk()) is not None))
        return logits

    monkeypatch.setattr(linear_chunks, "F", type("functional", (), {"linear": staticmethod(linear)}))
    return lambda: (len(chunks), most)


@both_implementations
@pytest.mark.parametrize(("reduction", "passes"), [("mean", 1), ("none", 2)])
@pytest.mark.usefixtures("small_chunks")
def test_one_chunk_of_logits_exists_at_a_time(
    implementation: str, reduction: str, passes: int, live_logits: Callable[[], tuple[int, int]]
) -> None:
    hidden, weight, targets = head()
    with use(implementation):
        linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
    assert live_logits() == (3 * passes, 16 * CLASSES)


def test_the_gradient_of_a_chunk_is_written_over_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = linear_chunks._product

    def watched(dlogits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(dlogits.data_ptr())
        return product(dlogits, hidden)

    def linear(*args: Any) -> torch.Tensor:
        logits = F.linear(*args)
        seen.append(logits.data_ptr())
        return logits

    monkeypatch.setattr(linear_chunks, "_product", watched)
    monkeypatch.setattr(linear_chunks, "F", type("functional", (), {"linear": staticmethod(linear)}))
    linear_cross_entropy(*head())
    logits, dlogits = seen
    assert logits == dlogits


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


def test_loss_scaling_saves_small_float16_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over many rows makes gradients that float16 cannot resolve, unless the upstream scale comes first."""
    rows, width, classes, scale = 2048, 8, 64, 65536.0
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 1024 * classes)
    hidden = torch.randn(rows, width).half().requires_grad_()
    weight = torch.randn(classes, width).half().requires_grad_()
    targets = torch.randint(classes, (rows,))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(reference(*wide, targets), wide, torch.tensor(scale, dtype=torch.float64))
    with use("reference"):
        loss = linear_cross_entropy(hidden, weight, targets)
        got = torch.autograd.grad(loss, (hidden, weight), torch.tensor(scale))
    for gradient, expected in zip(got, exact, strict=True):
        assert (gradient.double() - expected).norm() / expected.norm() < 1e-3


@both_implementations
def test_an_upstream_gradient_past_float16_is_no_infinity(implementation: str) -> None:
    """A loss scale of 2¹⁷ is infinite in float16, the scaled gradients are not; 1e-6 keeps its digits."""
    hidden = (2**-8 * torch.randn(8, 4)).half().requires_grad_()
    weight = (2**-8 * torch.randn(3, 4)).half().requires_grad_()
    targets = torch.randint(3, (8,))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for scale in (2.0**17, 3e-6):
        exact = torch.autograd.grad(reference(*wide, targets, reduction="sum"), wide, torch.tensor(scale).double())
        with use(implementation):
            loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
            got = torch.autograd.grad(loss, (hidden, weight), torch.tensor(scale))
        for gradient, expected in zip(got, exact, strict=True):
            torch.testing.assert_close(gradient.double(), expected, rtol=3e-3, atol=2**-24)


@both_implementations
def test_the_mean_over_no_rows_that_count_is_nan_with_a_gradient_of_zero(implementation: str) -> None:
    """As in PyTorch: one rank's batch without targets must not make NaN of every rank's weights."""
    hidden, weight, targets = head()
    targets.fill_(-100)
    plain = F.cross_entropy(F.linear(hidden, weight), targets)
    with use(implementation):
        loss = linear_cross_entropy(hidden, weight, targets)
    for result in (plain, loss):
        assert result.isnan()
        for gradient in torch.autograd.grad(result, (hidden, weight)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@both_implementations
def test_a_frozen_head_costs_no_weight_gradient(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head()
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets), hidden)
    monkeypatch.setattr(linear_chunks, "_add_product", lambda *_: pytest.fail("a weight gradient was computed"))
    for reduction in ("mean", "none"):
        with use(implementation):
            loss = linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        torch.testing.assert_close(gradient if reduction == "mean" else gradient / (targets != -100).sum(), expected)


def test_a_frozen_trunk_trains_the_head() -> None:
    hidden, weight, targets = head()
    bias = torch.randn(CLASSES, requires_grad=True)
    expected = torch.autograd.grad(reference(hidden, weight, targets, bias=bias), (weight, bias))
    loss = linear_cross_entropy(hidden.detach(), weight, targets, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(loss, (weight, bias)), expected)


class Dropped(torch.autograd.Function):
    """Passes on a loss and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_whose_gradient_is_dropped_gives_none(reduction: str) -> None:
    hidden, weight, targets = head()
    loss = Dropped.apply(linear_cross_entropy(hidden, weight, targets, reduction=reduction))
    (loss.sum() + hidden.sum()).backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_refuses_second_derivatives_and_repeats_its_backward_pass_to_the_bit(reduction: str) -> None:
    hidden, weight, targets = head()
    with use("reference"):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).square().sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            gradient.sum().backward()


@both_implementations
def test_autocast_computes_as_it_does_for_linear(implementation: str) -> None:
    hidden, weight, targets = head()
    with use(implementation):
        expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
        expected_gradients = torch.autograd.grad(expected, (hidden, weight))
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(got, (hidden, weight))
    assert got.item() == expected.item() != reference(hidden, weight, targets).item()
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(a, b)


@both_implementations
def test_a_backward_pass_inside_autocast_is_that_of_its_forward_pass(implementation: str) -> None:
    hidden, weight, targets = head()
    with use(implementation):
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
        expected = torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(losses.sum(), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("small_chunks")
def test_a_compiler_sees_through_a_few_chunks_and_not_through_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch that Inductor can fuse, as long as the number of chunks is known and small."""
    hidden, weight, targets = head()
    expected = reference(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))

    def ops(mode: str = "reference", **options: Any) -> list[str]:
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        with use(mode):
            got = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend, **options)(
                hidden, weight, targets
            )
            gradients = torch.autograd.grad(got, (hidden, weight))
        torch.testing.assert_close((got, *gradients), (expected, *expected_gradients))
        return [str(node.target) for node in backend.graphs[-1].graph.nodes if "tilewright" in str(node.target)]

    assert ops() == []
    # C++ computes a chunk's loss: nothing to fuse.
    assert ops("auto") == ["tilewright.linear_cross_entropy.default"]
    assert ops(dynamic=True) == ["tilewright.linear_cross_entropy.default"]
    monkeypatch.setattr(linear_chunks, "_TRACED_CHUNKS", 2)
    assert ops() == ["tilewright.linear_cross_entropy.default"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(())}, r"hidden has no dimension; it must be \(…, width\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden has dtype torch.int32; it must be float32, float16"),
        ({"hidden": torch.zeros(3, 4, device="meta")}, "weight is on cpu and hidden on meta; move one to the other"),
        ({"weight": torch.zeros(5)}, r"weight has 1 dimensions; it must be \(classes, width\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\); it must be \(5, 4\), \(classes, the last"),
        ({"weight": torch.zeros(5, 4).half()}, "weight has dtype torch.float16 and hidden torch.float32; convert one"),
        ({"weight": torch.zeros(0, 4)}, "weight has no classes"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(5,\), one for each row of weight"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \(2,\); it must be \(3,\)"),
        ({"targets": torch.tensor([0, 5, 1])}, "targets holds 5; each must be a class from 0 to 4"),
        ({"targets": torch.zeros(3)}, "targets has dtype torch.float32; it must be int64"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1; it must be between 0 and 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be 0 or more"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be more than 0"),
        ({"reduction": "average"}, "reduction is 'average'; it must be one of mean, sum, none"),
        ({"group": "world"}, "group is 'world'; it must be a torch.distributed.ProcessGroup"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**arguments, **changes})
