"""Views of a tensor as rows: how ops that work along the last dimension see inputs of any shape and stride."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` of shape (…, width) as (rows, width) with unit stride along a row.

    No copy is made where one row stride describes the rows, stride 0 (an expanded tensor) included.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
