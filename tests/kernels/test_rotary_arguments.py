"""What rotary and qk_norm_rotary cannot take is refused by the argument's name, with what was given and what is
allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tilewright.kernels.dispatch import use
from tilewright.kernels.qk_norm_rotary import qk_norm_rotary
from tilewright.kernels.rotary import rotary

Q = torch.zeros(2, 3, 4, 8)
K = torch.zeros(2, 3, 2, 8)
WEIGHT = torch.ones(8)
TABLE = torch.zeros(5, 4)
POSITIONS = torch.zeros(2, 3, dtype=torch.int64)


def named(message: str, arguments: dict[str, Any]) -> Any:
    return pytest.param(arguments, message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message)[:70])


def turn(q: torch.Tensor = Q, k: torch.Tensor = K, cos: torch.Tensor = TABLE, sin: Any = None, **options: Any) -> Any:
    return rotary(q, k, cos, cos if sin is None else sin, **options)


def normalise_and_turn(
    q: torch.Tensor = Q,
    k: torch.Tensor = K,
    cos: torch.Tensor = TABLE,
    sin: Any = None,
    q_weight: torch.Tensor = WEIGHT,
    k_weight: torch.Tensor = WEIGHT,
    **options: Any,
) -> Any:
    return qk_norm_rotary(q, k, q_weight, k_weight, cos, cos if sin is None else sin, **options)


OPS = {"rotary": turn, "qk_norm_rotary": normalise_and_turn}
any_op = pytest.mark.parametrize("op", OPS)


BOTH = [
    named("q has dtype torch.int64; it must be", {"q": Q.long()}),
    named("k has dtype torch.int64; it must be", {"k": K.long()}),
    named("cos has dtype torch.int64; it must be", {"cos": TABLE.long()}),
    named("sin has dtype torch.int64; it must be", {"sin": TABLE.long()}),
    named("q has shape (4, 8); it must be (batch, seq, heads", {"q": Q[0, 0]}),
    named("k has shape (3, 2, 8); it must be (2, 3, 2, 8), the shape of q but", {"k": K[0]}),
    named("k has shape (2, 2, 2, 8); it must be (2, 3, 2, 8), the shape of q", {"k": K[:, :2]}),
    named("k has shape (2, 3, 2, 6); it must be (2, 3, 2, 8), the shape of q", {"k": K[..., :6]}),
    named("k has shape (8,); it must be (2, 3, 1, 8)", {"k": K[0, 0, 0]}),
    named("k has dtype torch.float16 and q torch.float32", {"k": K.half()}),
    named("k is on meta and q on cpu", {"k": K.to("meta")}),
    named("cos has shape (4,); it must be (max_positions, rotary_dim / 2)", {"cos": TABLE[0]}),
    named("cos has shape (5, 5); it must be", {"cos": torch.zeros(5, 5)}),
    named(
        "cos has shape (5, 8); it must be (max_positions, rotary_dim / 2), and rotary_dim at most the",
        {"cos": torch.zeros(5, 8)},
    ),
    named("cos has shape (5, 0); it must be", {"cos": TABLE[:, :0]}),
    named("cos has dtype torch.float16 and q torch.float32", {"cos": TABLE.half()}),
    named("cos is on meta and q on cpu", {"cos": TABLE.to("meta")}),
    named("sin has shape (5, 3); it must be (5, 4), the shape of cos", {"sin": TABLE[:, :3]}),
    named("sin has dtype torch.float16 and cos torch.float32", {"sin": TABLE.half()}),
    named("sin is on meta and cos on cpu", {"sin": TABLE.to("meta")}),
    named("cos asks for a gradient", {"cos": TABLE.clone().requires_grad_(), "sin": TABLE}),
    named("sin asks for a gradient", {"sin": TABLE.clone().requires_grad_()}),
    named("cos has 2 positions and q a sequence of 3", {"cos": TABLE[:2]}),
    named("positions has dtype torch.float32; it must be int32", {"positions": POSITIONS.float()}),
    named("positions has shape (3,); it must be (2, 3)", {"positions": POSITIONS[0]}),
    named("positions is on meta and q on cpu", {"positions": POSITIONS.to("meta")}),
]

OF_THE_NORM = [
    named("q_weight has dtype torch.int64; it must be float32", {"q_weight": WEIGHT.long()}),
    named("k_weight has dtype torch.int64; it must be float32", {"k_weight": WEIGHT.long()}),
    named("q_weight has shape (7,); it must be (8,), the head_dim of q", {"q_weight": WEIGHT[:7]}),
    named("k_weight has shape (4, 8); it must be (8,), the head_dim of q", {"k_weight": WEIGHT.expand(4, 8)}),
    named("q_weight has dtype torch.float16 and q torch.float32", {"q_weight": WEIGHT.half()}),
    named("k_weight has dtype torch.bfloat16 and q torch.float32", {"k_weight": WEIGHT.bfloat16()}),
    named("q_weight is on meta and q on cpu", {"q_weight": WEIGHT.to("meta")}),
    named("k_weight is on meta and q on cpu", {"k_weight": WEIGHT.to("meta")}),
    named("eps is -1e-06; it must be at least 0", {"eps": -1e-6}),
    named("eps is nan; it must be at least 0", {"eps": float("nan")}),
]


@any_op
@pytest.mark.parametrize(("arguments", "message"), BOTH)
def test_what_does_not_fit_is_refused_by_name(op: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{op}: {message}")):
        OPS[op](**arguments)


@pytest.mark.parametrize(("arguments", "message"), OF_THE_NORM)
def test_what_the_norm_cannot_take_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"qk_norm_rotary: {message}")):
        normalise_and_turn(**arguments)


@any_op
@pytest.mark.parametrize("position", [-1, 5])
def test_on_cpu_a_position_outside_the_tables_is_refused(op: str, position: int) -> None:
    with use("auto"), pytest.raises(ValueError, match=re.escape("outside the tables; it must be 0 … 4")):
        OPS[op](positions=torch.full_like(POSITIONS, position))


@any_op
@pytest.mark.parametrize("position", [-1, 5, 2**40])
def test_in_the_kernel_a_position_outside_the_tables_makes_its_token_nan_and_no_other(op: str, position: int) -> None:
    positions = POSITIONS.clone()
    positions[1, 2] = position
    for out in OPS[op](q=Q + 1, k=K + 1, positions=positions):
        assert out[1, 2].isnan().all()
        assert out.isnan().sum() == out[1, 2].numel()
