"""What the contract cannot see of distillation: its limits, its chunks, and rows and classes that count for nothing."""

import importlib
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels import linear_chunks
from tilewright.kernels.dispatch import use
from tilewright.kernels.linear_kl import DIVERGENCES, linear_kl, reference

# The package's attribute of that name is the function.
linear_kl_module = importlib.import_module("tilewright.kernels.linear_kl")
ROWS, WIDTH, TEACHER_WIDTH, CLASSES = 40, 8, 12, 61
both_implementations = pytest.mark.parametrize("implementation", ["triton", "reference"])
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def heads() -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.randn(ROWS, WIDTH, requires_grad=True),
        "weight": torch.randn(CLASSES, WIDTH, requires_grad=True),
        "teacher_hidden": torch.randn(ROWS, TEACHER_WIDTH),
        "teacher_weight": torch.randn(CLASSES, TEACHER_WIDTH),
    }


def student(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors["hidden"], tensors["weight"]


@both_implementations
@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_add_up_to_the_divergence_of_all_logits(
    implementation: str, divergence: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_kl_module, "chunk_rows", lambda classes, device: 16)
    tensors = heads()
    options = {"divergence": divergence, "reduction": reduction, "temperature": 2.0}
    options["mask"] = torch.rand(ROWS) > 0.3
    expected = reference(**tensors, **options)
    upstream = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad(expected, student(tensors), upstream)
    with use(implementation):
        got = linear_kl(**tensors, **options)
        gradients = torch.autograd.grad(got, student(tensors), upstream)
    torch.testing.assert_close((got, *gradients), (expected, *expected_gradients))


@both_implementations
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_chunk_of_each_heads_logits_exists_at_a_time(
    implementation: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_kl_module, "chunk_rows", lambda classes, device: 16)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    product = F.linear

    def linear(*args: Any) -> torch.Tensor:
        nonlocal most
        logits = product(*args)
        alive.append(weakref.ref(logits))
        most = max(most, sum(x.numel() for chunk in alive if (x := chunk()) is not None))
        return logits

    monkeypatch.setattr(F, "linear", linear)
    with use(implementation):
        linear_kl(**heads(), reduction=reduction).sum().backward()
    assert len(alive) == (6 if reduction == "sum" else 12)  # three chunks of two heads, for "none" twice
    assert most == 2 * 16 * CLASSES


@both_implementations
@every_divergence
def test_a_student_that_is_its_teacher_has_nothing_to_learn(implementation: str, divergence: str) -> None:
    hidden, weight = (2 * x.detach() for x in student(heads()))
    tensors = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    tensors |= {"teacher_hidden": hidden.detach(), "teacher_weight": weight.detach()}
    with use(implementation):
        losses = linear_kl(**tensors, divergence=divergence, reduction="none")
        gradients = torch.autograd.grad(losses.sum(), student(tensors))
    assert losses.abs().max() < 1e-6
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4


def test_the_directions_are_those_of_kl_div() -> None:
    tensors = heads()
    log_q = torch.log_softmax(F.linear(*student(tensors)), -1)
    log_p = torch.log_softmax(F.linear(tensors["teacher_hidden"], tensors["teacher_weight"]), -1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(linear_kl(**tensors, divergence="forward"), forward)
    torch.testing.assert_close(linear_kl(**tensors, divergence="reverse"), reverse)
    assert abs(forward.item() - reverse.item()) > 0.1


@both_implementations
def test_distributions_with_nothing_in_common_are_log_2_apart_by_jensen_shannon(implementation: str) -> None:
    hidden = torch.ones(1, 1)
    student_weight, teacher_weight = torch.tensor([[200.0], [0.0]]), torch.tensor([[0.0], [200.0]])
    with use(implementation):
        inputs = (hidden, student_weight, hidden, teacher_weight)
        apart = linear_kl(*inputs, divergence="jensen-shannon")
        assert linear_kl(*inputs, divergence="forward").item() == pytest.approx(200.0)
        assert linear_kl(*inputs, divergence="reverse").item() == pytest.approx(200.0)
    assert apart.item() == pytest.approx(math.log(2.0), rel=1e-6)


@both_implementations
@every_divergence
def test_a_high_temperature_leaves_the_gradient_its_size(implementation: str, divergence: str) -> None:
    """Hinton et al. 2015, section 2.1: times T², the gradient tends to that of squared differences of logits."""
    tensors = heads()
    s, t = F.linear(*student(tensors)), F.linear(tensors["teacher_hidden"], tensors["teacher_weight"])
    difference = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    share = 0.25 if divergence == "jensen-shannon" else 1.0
    limit = torch.autograd.grad(share * difference.square().sum() / (2 * CLASSES), student(tensors))
    with use(implementation):
        loss = linear_kl(**tensors, divergence=divergence, temperature=500.0, reduction="sum")
        gradients = torch.autograd.grad(loss, student(tensors))
    for gradient, expected in zip(gradients, limit, strict=True):
        assert (gradient - expected).norm() < 0.05 * expected.norm()


@both_implementations
@every_divergence
def test_classes_that_both_exclude_count_for_nothing(implementation: str, divergence: str) -> None:
    """A vocabulary padded to a round number, its last classes held at −∞ by both biases."""
    tensors = heads()
    bias = torch.zeros(CLASSES)
    bias[50:] = -math.inf
    inputs = {name: x.detach() for name, x in tensors.items()}
    inputs |= {name: inputs[name][:50] for name in ("weight", "teacher_weight")}
    expected = reference(**inputs, divergence=divergence)
    with use(implementation):
        got = linear_kl(**tensors, bias=bias, teacher_bias=bias, divergence=divergence)
        gradients = torch.autograd.grad(got, student(tensors))
    torch.testing.assert_close(got, expected)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][50:].any()


@both_implementations
@every_divergence
def test_rows_left_out_by_the_mask_are_not_looked_at(implementation: str, divergence: str) -> None:
    tensors = {name: x.detach().clone() for name, x in heads().items()}
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[::3] = False
    tensors["teacher_hidden"][::3] = math.nan
    tensors["hidden"].requires_grad_()
    with use(implementation):
        losses = linear_kl(**tensors, mask=mask, divergence=divergence, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), tensors["hidden"])
        assert linear_kl(**tensors, mask=mask, divergence=divergence).item() == pytest.approx(
            losses[mask].mean().item()
        )
    assert not losses[::3].any()
    assert not gradient[::3].any()
    assert (losses[mask] > 0).all()


@both_implementations
def test_the_teacher_takes_no_gradient(implementation: str) -> None:
    tensors = {name: x.detach().requires_grad_() for name, x in heads().items()}
    with use(implementation):
        linear_kl(**tensors).backward()
    assert tensors["weight"].grad is not None
    assert tensors["teacher_weight"].grad is None
    assert tensors["teacher_hidden"].grad is None


@both_implementations
def test_a_frozen_student_head_costs_no_weight_gradient(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads()
    tensors["weight"] = tensors["weight"].detach()
    monkeypatch.setattr(linear_chunks, "_add_product", lambda *_: pytest.fail("a weight gradient was computed"))
    (expected,) = torch.autograd.grad(reference(**tensors), tensors["hidden"])
    with use(implementation):
        (gradient,) = torch.autograd.grad(linear_kl(**tensors), tensors["hidden"])
    torch.testing.assert_close(gradient, expected)


def test_autocast_computes_as_it_does_for_linear() -> None:
    tensors = {name: x.detach() for name, x in heads().items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_kl(**tensors)
    assert got.item() == linear_kl(**{name: x.bfloat16() for name, x in tensors.items()}).item()
    assert got.item() != linear_kl(**tensors).item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(5)}, r"weight has 1 dimensions; it must be \(classes, width\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\); it must be \(5, 4\)"),
        ({"weight": torch.zeros(5, 4).half()}, "weight has dtype torch.float16 and hidden torch.float32"),
        ({"teacher_weight": torch.zeros(5, 3)}, r"teacher_weight has shape \(5, 3\); it must be \(5, 6\)"),
        (
            {"teacher_weight": torch.zeros(7, 6)},
            r"teacher_weight has shape \(7, 6\); it must be \(5, 6\), with the cla",
        ),
        ({"teacher_hidden": torch.zeros(2, 6)}, r"teacher_hidden has shape \(2, 6\); it must be \(3, 6\), the rows of"),
        ({"teacher_hidden": torch.zeros(3, 6).int()}, "teacher_hidden has dtype torch.int32; it must be float32"),
        ({"teacher_bias": torch.zeros(4)}, r"teacher_bias has shape \(4,\); it must be \(5,\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(5,\)"),
        ({"mask": torch.ones(3)}, "mask has dtype torch.float32; it must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask has shape \(2,\); it must be \(3,\), one for each row"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be finite and more than 0"),
        ({"temperature": math.nan}, "temperature is nan; it must be finite and more than 0"),
        ({"divergence": "kl"}, "divergence is 'kl'; it must be one of forward, reverse, jensen-shannon"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'; it must be one of mean, sum, none"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
    arguments |= {"teacher_hidden": torch.zeros(3, 6), "teacher_weight": torch.zeros(5, 6)}
    with pytest.raises(ValueError, match=f"^linear_kl: {message}"):
        linear_kl(**{**arguments, **changes})
