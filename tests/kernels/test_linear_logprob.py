"""Per-token log-probabilities as preference training uses them."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch import use
from tilewright.kernels.linear_logprob import linear_logprob, reference

both_implementations = pytest.mark.parametrize("implementation", ["triton", "reference"])


def responses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (pairs × chosen and rejected, tokens, width), a head, and targets with a prompt left out."""
    hidden, weight = torch.randn(6, 7, 8, requires_grad=True), (0.3 * torch.randn(33, 8)).requires_grad_()
    targets = torch.randint(33, (6, 7))
    targets[:, :2] = -100
    return hidden, weight, targets


def dpo_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Rafailov et al. 2023, equation 7, against a reference policy of constant log-probability."""
    chosen, rejected = logprobs.sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def grpo_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Shao et al. 2024, equation 3 without its divergence: clipped ratios to an older policy, weighed by advantage."""
    ratio = torch.exp(logprobs - logprobs.detach().roll(1, 0))
    advantage = torch.linspace(-1.0, 1.0, 6)[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


@both_implementations
@pytest.mark.parametrize("objective", [dpo_loss, grpo_loss])
def test_objectives_of_preference_training_get_the_gradient_of_plain_pytorch(
    implementation: str, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("tilewright.kernels.linear_cross_entropy")
    monkeypatch.setattr(module, "chunk_rows", lambda classes, device: 16)  # 42 tokens: three chunks
    hidden, weight, targets = responses()
    expected = objective(reference(hidden, weight, targets))
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    with use(implementation):
        got = objective(linear_logprob(hidden, weight, targets))
        gradients = torch.autograd.grad(got, (hidden, weight))
    torch.testing.assert_close((got, *gradients), (expected, *expected_gradients))


@both_implementations
def test_ignored_tokens_have_log_probability_zero_and_take_no_gradient(implementation: str) -> None:
    hidden, weight, targets = responses()
    with use(implementation):
        logprobs = linear_logprob(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert logprobs.dtype == torch.float32
    assert set(logprobs[:, :2].flatten().tolist()) == {0.0}
    assert not logprobs[:, :2].signbit().any()  # no −0, which prints as one
    assert not gradient[:, :2].any()
    assert (logprobs[:, 2:] < 0).all()
    assert (gradient[:, 2:] != 0).any(-1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(())}, "hidden has no dimension"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\); it must be \(5, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(5,\)"),
        ({"targets": torch.tensor([0, -1, 1])}, "targets holds -1; each must be a class from 0 to 4"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets has shape \(2,\); it must be \(3,\)"),
        ({"softcap": -3.0}, "softcap is -3.0; it must be more than 0, or None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
        linear_logprob(**{**arguments, **changes})
