"""`CrossEntropyLoss` and `LinearCrossEntropyLoss`, the counterparts of those of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.checks import check_tensors
from tilewright.kernels.cross_entropy import check_loss_options, cross_entropy
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy
from tilewright.kernels.nn.checks import check_size, refuse


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` by `cross_entropy`; the loss is float32, or float64 for float64 logits.

    Args:
        weight, size_average, reduce: not supported; must be None.
        ignore_index, reduction, label_smoothing: as there.
        z_loss, softcap, group, return_z_loss: as in `cross_entropy`.

    Raises:
        ValueError: an argument is not supported or out of its range.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        for name, value in (("weight", weight), ("size_average", size_average), ("reduce", reduce)):
            instead = "every class counts alike" if name == "weight" else "reduction says what it said"
            refuse("CrossEntropyLoss", name, value, None, instead)
        check_loss_options("CrossEntropyLoss", label_smoothing, z_loss, softcap, reduction, group)
        super().__init__(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.group = group
        self.return_z_loss = return_z_loss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        """The loss of logits (classes,), (N, classes) or (N, classes, d1, …) for targets (), (N,) or (N, d1, …).

        Raises:
            ValueError: a shape, dtype, device or option does not fit; targets that are class probabilities are refused.
        """
        check_tensors("CrossEntropyLoss", input=input)
        _check_class_indices("CrossEntropyLoss", target)
        return cross_entropy(input.movedim(1, -1) if input.ndim > 2 else input, target, **_options(self))

    def extra_repr(self) -> str:
        return _repr(self)


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """``torch.nn.LinearCrossEntropyLoss`` by `linear_cross_entropy`: a head and its loss, without all the logits.

    The head is ``self.linear``; to tie it to an embedding: ``loss.linear.weight = embedding.weight``. Under FSDP shard
    this module, or one around it, and not ``linear`` alone, whose weight is read without calling it.

    Args:
        in_features, num_classes, bias, device, dtype, reduction, label_smoothing: as there.
        ignore_index: as there; None stands for −100.
        out_features: not supported; must be ().
        weight, options: not supported; must be None.
        z_loss, softcap, return_z_loss: as in `linear_cross_entropy`.
        group: as there; num_classes then counts this rank's part of the classes.

    Raises:
        ValueError: an argument is not supported or out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        name = "LinearCrossEntropyLoss"
        refuse(name, "out_features", out_features, (), "there is one loss for each row of the input")
        refuse(name, "weight", weight, None, "every class counts alike")
        refuse(name, "options", options, None, "the logits always come in chunks of bounded size")
        check_size(name, "in_features", in_features)
        check_size(name, "num_classes", num_classes)
        check_loss_options(name, label_smoothing, z_loss, softcap, reduction, group)
        super().__init__(
            in_features,
            num_classes,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            ignore_index=-100 if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
        )
        self.z_loss = z_loss
        self.softcap = softcap
        self.group = group
        self.return_z_loss = return_z_loss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        """The loss of hidden states (…, in_features) for targets (…).

        Raises:
            ValueError: a shape, dtype, device or option does not fit; targets that are class probabilities are refused.
        """
        _check_class_indices("LinearCrossEntropyLoss", target)
        return linear_cross_entropy(input, self.linear.weight, target, bias=self.linear.bias, **_options(self))

    def extra_repr(self) -> str:
        head = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        return f"{head}, bias={self.linear.bias is not None}, {_repr(self)}"


def _check_class_indices(module: str, target: torch.Tensor) -> None:
    check_tensors(module, target=target)
    if target.is_floating_point():
        raise ValueError(
            f"{module}: target has dtype {target.dtype}; it must be int64, indices of classes: class probabilities are "
            "not supported"
        )


_OPTIONS = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction", "group", "return_z_loss")


def _options(loss: CrossEntropyLoss | LinearCrossEntropyLoss) -> dict[str, Any]:
    """The loss's options by the ops' names."""
    return {name: getattr(loss, name) for name in _OPTIONS}


def _repr(loss: CrossEntropyLoss | LinearCrossEntropyLoss) -> str:
    return ", ".join(f"{name}={getattr(loss, name)!r}" for name in _OPTIONS if name != "group")
