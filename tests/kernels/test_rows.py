"""How rows are shared out: the bytes that the norms really move, and sums in a fixed order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.kernels import layer_norm, rms_norm
from tilewright.kernels.launch import Configuration, LaunchTable, as_if_on
from tilewright.kernels.rows import divide, sum_over_programs

NORMS = {rms_norm: ("weight",), layer_norm: ("weight", "bias")}


@pytest.mark.parametrize(
    ("rows", "width", "residual", "bar"),
    [
        (64, 512, False, 1.05),
        (64, 512, True, 1.05),
        (64, 8192, False, 1.05),
        (64, 8192, True, 1.05),
        (64, 16384, False, 1.05),
        (96, 16640, False, 1.70),
        (32, 16640, True, 1.70),
    ],
)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_norms_move_little_more_than_each_input_and_output_once(
    norm: Any,
    rows: int,
    width: int,
    residual: bool,
    bar: float,
    issued: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One processor takes all rows: as many as each of a GPU's takes where the batch is large.
    monkeypatch.setattr("tilewright.kernels.rows.processors", lambda device: 1)
    tensors = {"x": torch.randn(rows, width).half()}
    tensors |= {name: torch.randn(width).half() for name in NORMS[norm]}
    if residual:
        tensors["residual"] = torch.randn(rows, width).half()
    inputs = [tensor.requires_grad_() for tensor in tensors.values()]
    outputs = norm(**tensors)
    forward = issued()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn(rows, width).half() for _ in outputs]
    torch.autograd.grad(outputs, inputs, upstream)
    backward = issued()
    row, parameters = 2 * rows * width, len(NORMS[norm]) * 2 * width
    assert 1 <= forward / ((4 if residual else 2) * row + parameters) <= bar
    # The upstream gradients, the row that was normalised, its gradient; the weight, and the parameters' gradients.
    compulsory = (4 if residual else 3) * row + 2 * width + parameters
    assert 1 <= backward / compulsory <= bar


def test_programs_are_the_fewest_that_are_done_as_soon_as_one_a_processor_would_be() -> None:
    table = LaunchTable(
        "rows", {90: (Configuration(8192, 4, {"BLOCK_COLUMNS": 512, "BLOCK_ELEMENTS": 1024, "PROGRAMS": 1}),)}
    )
    with as_if_on(90):  # 132 processors
        whole = divide(4096, 512, table, torch.device("cpu"))
        wide = divide(4096, 2000, table, torch.device("cpu"))
    # 2,048 blocks of two rows: 16 for each of 128 programs take as long as 16 and 15 for each of 132.
    assert (whole.grid, whole.options["BLOCK_ROWS"]) == ((128, 1), 2)
    assert wide.grid == (33, 4)


@pytest.mark.parametrize(("programs", "width"), [(1, 1), (3, 100), (130, 65)])
def test_the_sum_over_programs_is_exact_to_float32_and_leaves_padding_out(programs: int, width: int) -> None:
    sums = torch.full((programs, width + 15), float("nan"))
    sums[:, :width] = torch.randn(programs, width)
    total = sum_over_programs(sums, torch.empty(width))
    torch.testing.assert_close(total, sums[:, :width].double().sum(0).float(), rtol=1e-6, atol=1e-5)
