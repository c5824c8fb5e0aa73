"""What the contract cannot see of cross-entropy: extreme rows, and targets that are no class."""

import math

import pytest
import torch

from tilewright.kernels.cross_entropy import cross_entropy, forward_op
from tilewright.kernels.dispatch import use


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
def test_logits_of_any_size_give_finite_losses(implementation: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, -3e38]], requires_grad=True)
    with use(implementation):
        losses = cross_entropy(logits, torch.tensor([1, 1]), reduction="none")
    assert losses.tolist() == [2e4, 0.0]


def test_the_mean_over_no_rows_is_nan_as_in_pytorch() -> None:
    targets = torch.full((3,), -100)
    assert cross_entropy(torch.randn(3, 5), targets).isnan()
    assert torch.nn.functional.cross_entropy(torch.randn(3, 5), targets).isnan()


def test_a_target_that_is_no_class_is_refused_on_cpu() -> None:
    with pytest.raises(ValueError, match="targets holds 5; each must be a class from 0 to 4"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 5]))


def test_a_target_that_is_no_class_makes_the_kernels_loss_nan() -> None:
    """On a GPU nobody looks at the targets first."""
    losses, _ = forward_op(torch.randn(3, 5), torch.tensor([1, 5, -7]), -100, 0.0, 0.0, 0.0)
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be between 0 and 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0; it must be 0 or more"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be more than 0"),
        ({"reduction": "avg"}, "reduction is 'avg'; it must be one of mean, sum, none"),
        ({"group": object()}, "group is not supported yet"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]), **options)


def test_targets_of_another_shape_or_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets has shape \(3,\); it must be \(2,\)"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"targets has dtype torch.int32; it must be int64"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 1], dtype=torch.int32))
