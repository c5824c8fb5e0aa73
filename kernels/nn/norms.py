"""`RMSNorm` and `LayerNorm`, the counterparts of those of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.checks import check_float, check_tensors, is_number
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.rms_norm import rms_norm
from tilewright.kernels.rows import accumulation_dtype


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` by `rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as there; eps None is the machine epsilon of float32
            (of float64 for float64 inputs).
        weight_offset: added to the weight, which then starts at 1 − weight_offset; 1.0 gives Gemma's 1 + w.
    """

    weight_offset = 0.0

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        if not is_number(weight_offset):
            raise ValueError(f"RMSNorm: weight_offset is {weight_offset!r}; it must be a number below 2⁶³ in size")
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.weight_offset = weight_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that, with its offset, it scales by 1."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The normalised `x` (…, *normalized_shape); with a residual of its shape (normalised sum, sum).

        Raises:
            ValueError: a shape, dtype or device does not fit.
        """
        _check_normalized("RMSNorm", "x", x, self.normalized_shape)
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps if self.eps is None else self.eps
        rows, weight, residual = _flat(self.normalized_shape, x, self.weight, residual)
        result = rms_norm(rows, weight, eps=eps, weight_offset=self.weight_offset, residual=residual)
        return _shaped(result, x.shape)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` by `layer_norm`; its arguments."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The normalised `input` (…, *normalized_shape); with a residual of its shape (normalised sum, sum).

        Raises:
            ValueError: a shape, dtype or device does not fit.
        """
        _check_normalized("LayerNorm", "input", input, self.normalized_shape)
        rows, weight, bias, residual = _flat(self.normalized_shape, input, self.weight, self.bias, residual)
        return _shaped(layer_norm(rows, weight, bias, eps=self.eps, residual=residual), input.shape)


def _check_normalized(module: str, name: str, x: torch.Tensor, normalized_shape: tuple[int, ...]) -> None:
    check_tensors(module, **{name: x})
    check_float(module, **{name: x})
    count = len(normalized_shape)
    if not count or x.shape[-count:] != normalized_shape:
        raise ValueError(
            f"{module}: {name} has shape {tuple(x.shape)}; its last dimensions must be normalized_shape, "
            f"{normalized_shape}, of at least one dimension"
        )


def _flat(normalized_shape: tuple[int, ...], *tensors: torch.Tensor | None) -> list[Any]:
    """The tensors with the dimensions that are normalised together as one."""
    return [x.flatten(-len(normalized_shape)) if isinstance(x, torch.Tensor) else x for x in tensors]


def _shaped(result: torch.Tensor | tuple[torch.Tensor, ...], shape: torch.Size) -> Any:
    """`_flat` undone."""
    return tuple(y.view(shape) for y in result) if isinstance(result, tuple) else result.view(shape)
