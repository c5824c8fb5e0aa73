"""What the contract cannot see of cross-entropy: extreme rows, one read of the logits, bad targets."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tilewright.kernels.accuracy import Comparison, largest, outputs_of, run
from tilewright.kernels.cross_entropy import (
    SPEC,
    cross_entropy,
    forward_op,
    losses_and_gradient,
    reference,
)
from tilewright.kernels.dispatch import use

CPU = torch.device("cpu")
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
]
# Fits one block, and does not.
WIDTHS = [50, 33000]


def rows(count: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that take a gradient, and targets, of which the second is ignored."""
    targets = torch.randint(classes, (count,))
    targets[1] = -100
    return (3 * torch.randn(count, classes)).to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_loss_of_a_sure_prediction_is_not_lost_to_rounding(implementation: str) -> None:
    """lse and the target's logit are both about 60 here; their float32 difference is a multiple of 4e-6."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 15.0
    logits += 45.0
    with use(implementation):
        loss = cross_entropy(logits, torch.tensor([7])).item()
    assert loss == pytest.approx(math.log1p(49 * math.exp(-15.0)), rel=4e-2)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("gradient", [True, False])
def test_logits_of_any_size_give_finite_losses(implementation: str, gradient: bool) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, -3e38]], requires_grad=gradient)
    with use(implementation):
        losses = cross_entropy(logits, torch.tensor([1, 1]), reduction="none")
    assert losses.tolist() == [2e4, 0.0]


@pytest.mark.parametrize("gradient", [True, False])
def test_classes_at_minus_infinity_take_no_part(gradient: bool) -> None:
    """Padding of the vocabulary, as some models mask it."""
    logits = torch.randn(3, 40)
    padded = F.pad(logits, (0, 24), value=-math.inf).requires_grad_(gradient)
    targets = torch.randint(40, (3,))
    loss = cross_entropy(padded, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    if gradient:
        loss.backward()
        assert torch.count_nonzero(padded.grad[:, 40:]) == 0
        assert padded.grad[:, :40].isfinite().all()


def test_the_mean_over_no_rows_is_nan_as_in_pytorch() -> None:
    targets = torch.full((3,), -100)
    assert cross_entropy(torch.randn(3, 5), targets).isnan()
    assert F.cross_entropy(torch.randn(3, 5), targets).isnan()


# The gradient that the forward pass writes. The contract's upstream gradients are random, so that there the backward
# pass computes it.


def samples() -> list[Any]:
    return [
        pytest.param(index, dtype, id=f"{sample.label}-{str(dtype)[6:]}".replace(" ", "_"))
        for dtype in (torch.float32, torch.float16)
        for index, sample in enumerate(SPEC.samples(CPU, torch.float32))
    ]


@pytest.mark.parametrize(("index", "dtype"), samples())
def test_the_gradient_of_the_loss_itself_is_within_twice_the_error_of_pytorch(index: int, dtype: torch.dtype) -> None:
    torch.manual_seed(index)
    sample = list(SPEC.samples(CPU, dtype))[index]
    upstream = [torch.ones_like(x) for x in outputs_of(SPEC.function(**sample.tensors, **sample.options))]
    ours = run(SPEC.function, SPEC, sample, dtype, upstream).gradients["logits"]
    same = run(SPEC.reference, SPEC, sample, dtype, upstream).gradients["logits"]
    exact = run(SPEC.reference, SPEC, sample, torch.float64, upstream).gradients["logits"]
    compared = Comparison("gradient of logits", ours, same, exact, largest([exact]))
    assert compared.error <= compared.allowed(SPEC.tolerance)
    assert not ours.isnan().any()


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_backward_pass_through_a_graph_gives_the_same_bits(
    reduction: str, options: dict[str, float], classes: int
) -> None:
    """The first hands out what the forward pass wrote; the caller may change it, as adding the second to it does."""
    logits, targets = rows(3, classes)
    loss = cross_entropy(logits, targets, reduction=reduction, **options)
    one = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, logits, one, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, one, retain_graph=True)
    assert torch.equal(second, expected)
    assert second.data_ptr() != first.data_ptr()
    for times in (1, 2, 3):
        loss.backward(one, retain_graph=True)
        torch.testing.assert_close(logits.grad, times * expected)


def test_rows_of_one_loss_may_get_the_upstream_that_was_anticipated_or_another() -> None:
    logits, targets = rows(6, 300)
    upstream = torch.tensor([1.0, 1.0, 0.0, -2.5, 1.0, math.pi])
    losses = cross_entropy(logits, targets, reduction="none")
    (got,) = torch.autograd.grad(losses, logits, upstream)
    (expected,) = torch.autograd.grad(reference(logits, targets, reduction="none"), logits, upstream)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wrap", ["checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_saved_tensors_may_be_recomputed_or_moved_away(wrap: str, scale: float) -> None:
    logits, targets = rows(4, 60)
    expected = scale * torch.autograd.grad(reference(logits, targets), logits)[0]
    if wrap == "checkpoint":
        loss = checkpoint(cross_entropy, logits, targets, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = cross_entropy(logits, targets)
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, logits, torch.tensor(scale), retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_a_backward_pass_may_be_compiled_apart() -> None:
    logits, targets = rows(4, 60)
    (expected,) = torch.autograd.grad(reference(logits, targets), logits)
    loss = cross_entropy(logits, targets)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    torch.testing.assert_close(logits.grad, expected)


def test_logits_that_change_before_the_backward_pass_are_an_error() -> None:
    logits, targets = rows(4, 60)
    loss = cross_entropy(scaled := logits * 2.0, targets)
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loss_scaling_saves_small_float16_gradients() -> None:
    """A mean over many rows makes gradients below float16's smallest number, unless the upstream scale comes first."""
    count, classes, scale = 60, 5000, 65536.0
    logits, targets = torch.zeros(count, classes, dtype=torch.float16, requires_grad=True), torch.zeros(count).long()
    (got,) = torch.autograd.grad(cross_entropy(logits, targets), logits, torch.tensor(scale))
    exact = scale / count / classes  # of which float16 would have kept six bits before the scale
    assert got[0, 1].item() == pytest.approx(exact, rel=2**-11)


# Bytes that the kernels issue, counted in the interpreter.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("classes", "bar"), [(1000, 1.05), (32000, 1.05), (32768, 1.05), (32769, 1.55), (131072, 1.55)]
)
def test_loss_and_gradient_read_the_logits_once_where_a_row_fits_and_twice_beyond(
    issued: Callable[[], int], classes: int, bar: float, reduction: str
) -> None:
    logits = torch.randn(2, classes, dtype=torch.float16, requires_grad=True)
    cross_entropy(logits, torch.tensor([0, 5]), reduction=reduction).sum().backward()
    assert 1.0 <= issued() / (2 * logits.nbytes) <= bar


@pytest.mark.parametrize(("classes", "bar"), [(1000, 1.05), (32768, 1.05), (32769, 1.55)])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_chunk_is_read_once_where_a_row_fits_and_twice_beyond(
    issued: Callable[[], int], classes: int, bar: float, overwrite: bool
) -> None:
    logits = torch.randn(2, classes, dtype=torch.float16)
    losses_and_gradient(logits, torch.tensor([0, 5]), torch.ones(2), overwrite=overwrite)
    assert 1.0 <= issued() / (2 * logits.nbytes) <= bar


@pytest.mark.parametrize("classes", WIDTHS)
def test_rows_that_count_for_nothing_are_not_read(issued: Callable[[], int], classes: int) -> None:
    logits = torch.randn(2, classes, requires_grad=True)
    cross_entropy(logits, torch.full((2,), -100), reduction="sum").backward()
    assert issued() == pytest.approx(logits.nbytes, rel=0.3)  # the gradient's zeros, and the numbers of each row
    assert torch.count_nonzero(logits.grad) == 0


# The z-loss apart.


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_z_loss_is_told_apart_and_is_part_of_the_loss(
    reduction: str, softcap: float | None, classes: int, implementation: str
) -> None:
    logits, targets = rows(3, classes)
    with use(implementation):
        loss, z_loss = cross_entropy(
            logits, targets, z_loss=1e-2, softcap=softcap, reduction=reduction, return_z_loss=True
        )
        without = cross_entropy(logits, targets, softcap=softcap, reduction=reduction)
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.where(targets == -100, 0.0, 1e-2 * z.logsumexp(-1).square())
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / 2}[reduction]
    torch.testing.assert_close(z_loss, expected.detach())
    torch.testing.assert_close(loss, without + z_loss)
    assert loss.requires_grad
    assert not z_loss.requires_grad


# Chunks of logits, for ops that make them.


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_chunk_has_the_losses_and_the_gradient_of_the_op(
    overwrite: bool, options: dict[str, float], classes: int, implementation: str
) -> None:
    logits, targets = rows(4, classes)
    upstream = torch.tensor([1.0, 2.0, -0.5, 0.25])
    expected = reference(logits, targets, reduction="none", return_z_loss=True, **options)
    (gradient,) = torch.autograd.grad(expected[0], logits, upstream)
    chunk = logits.detach().clone()
    before = chunk.clone()
    with use(implementation):
        *plain, nothing = losses_and_gradient(chunk, targets, None, **options)
        assert nothing is None
        *got, dlogits = losses_and_gradient(chunk, targets, upstream, overwrite=overwrite, **options)
    for results in (plain, got):
        torch.testing.assert_close(tuple(results), tuple(x.detach() for x in expected))
    torch.testing.assert_close(dlogits, gradient)
    if overwrite:
        assert dlogits.data_ptr() == chunk.data_ptr()
    else:
        assert torch.equal(chunk, before)


# Arguments.


@pytest.mark.parametrize("classes", WIDTHS)
def test_a_target_that_is_no_class_makes_the_kernels_loss_nan(classes: int) -> None:
    """On a GPU nobody looks at the targets first."""
    logits, targets = torch.randn(3, classes), torch.tensor([1, classes, -7])
    losses, _ = forward_op(logits, targets, -100, 0.0, 0.0, 0.0)
    assert losses.isnan().tolist() == [False, True, True]
    losses, _, _ = losses_and_gradient(logits, targets, torch.ones(3))
    assert losses.isnan().tolist() == [False, True, True]


def test_a_target_that_is_no_class_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="targets holds 5; each must be a class from 0 to 4"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be between 0 and 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be 0 or more"),
        ({"z_loss": math.nan}, "z_loss is nan; it must be 0 or more"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be more than 0"),
        ({"reduction": "avg"}, "reduction is 'avg'; it must be one of mean, sum, none"),
        ({"group": "world"}, "group is 'world'; it must be a torch.distributed.ProcessGroup, or None"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), **options)


def test_logits_without_classes_and_targets_of_another_shape_or_dtype_are_refused() -> None:
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"logits has shape \(.*\); it must be \(…, classes\)"):
            cross_entropy(torch.randn(shape), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"targets has shape \(3,\); it must be \(2,\)"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"targets has dtype torch.int32; it must be int64"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1], dtype=torch.int32))
