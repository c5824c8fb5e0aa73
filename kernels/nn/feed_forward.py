"""`SwiGLU` and `GEGLU`: the gated feed-forward layers of LLaMA and Gemma."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels.geglu import geglu
from tilewright.kernels.nn.checks import check_size, check_width
from tilewright.kernels.swiglu import swiglu


class _GatedMLP(torch.nn.Module):
    """down_proj(activation(gate_proj(x)) · up_proj(x)), without the activation."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        for name, value in (("in", in_features), ("hidden", hidden_features), ("out", out_features)):
            check_size(type(self).__name__, f"{name}_features", value)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = out_features
        self.gate_proj = torch.nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = torch.nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = torch.nn.Linear(hidden_features, out_features, bias, device, dtype)

    def _gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_width(type(self).__name__, "x", x, self.in_features, "in_features")
        return self.gate_proj(x), self.up_proj(x)


class SwiGLU(_GatedMLP):
    """The feed-forward layer of LLaMA, down_proj(silu(gate_proj(x)) · up_proj(x)), by `swiglu`.

    ``torch.nn`` has no counterpart. The projections bear the names of LLaMA's in ``transformers``, so its checkpoints
    load as they are; as there, they have no bias unless asked.

    Args:
        in_features: width of the input.
        hidden_features: width of gate and up.
        out_features: width of the output; in_features if None.
        bias, device, dtype: of the three projections, as in ``torch.nn.Linear``.

    Raises:
        ValueError: a width is below 1.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        y: torch.Tensor = self.down_proj(swiglu(*self._gate_and_up(x)))
        return y


class GEGLU(_GatedMLP):
    """The feed-forward layer of Gemma, down_proj(gelu(gate_proj(x)) · up_proj(x)), by `geglu`.

    Args:
        in_features, hidden_features, out_features, bias, device, dtype: as in `SwiGLU`.
        approximate: ``"none"``, or ``"tanh"``, which Gemma takes.

    Raises:
        ValueError: a width is below 1, or `approximate` is neither.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        approximate: str = "none",
    ) -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GEGLU: approximate is {approximate!r}; it must be 'none' or 'tanh'")
        super().__init__(in_features, hidden_features, out_features, bias, device, dtype)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) → (…, out_features)."""
        y: torch.Tensor = self.down_proj(geglu(*self._gate_and_up(x), approximate=self.approximate))
        return y

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
