"""What layer_norm, swiglu and rotary cannot take is refused by the argument's name, with what was given and what is
allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.kernels.dispatch import use
from tilewright.kernels.layer_norm import layer_norm
from tilewright.kernels.rotary import rotary, rotary_tables
from tilewright.kernels.swiglu import swiglu

X = torch.zeros(3, 8)
HALF = X.half()
INTEGERS = torch.zeros(3, 8, dtype=torch.int64)
ELSEWHERE = torch.zeros(3, 8, device="meta")
Q = torch.zeros(2, 3, 4, 8)
K = torch.zeros(2, 3, 2, 8)
TABLE = torch.zeros(5, 4)
POSITIONS = torch.zeros(2, 3, dtype=torch.int64)


def named(message: str, call: Callable[[], Any]) -> Any:
    return pytest.param(call, message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message)[:70])


LAYER_NORM = [
    named("layer_norm: x has dtype torch.int64; it must be float32", lambda: layer_norm(INTEGERS)),
    named("layer_norm: weight has dtype torch.int64; it must be", lambda: layer_norm(X, INTEGERS[0])),
    named("layer_norm: bias has dtype torch.int64; it must be", lambda: layer_norm(X, None, INTEGERS[0])),
    named("layer_norm: x has no dimension; it must be (…, width)", lambda: layer_norm(torch.tensor(1.0))),
    named("layer_norm: weight has shape (7,); it must be (8,), the last", lambda: layer_norm(X, X[0, :7])),
    named("layer_norm: bias has shape (3, 8); it must be (8,), the last", lambda: layer_norm(X, None, X)),
    named("layer_norm: residual has shape (8,); it must be (3, 8)", lambda: layer_norm(X, residual=X[0])),
    named("layer_norm: residual has dtype torch.float16 and x torch.float32", lambda: layer_norm(X, residual=HALF)),
    named("layer_norm: weight has dtype torch.float16 and x torch.float32", lambda: layer_norm(X, HALF[0])),
    named("layer_norm: bias has dtype torch.float16 and x torch.float32", lambda: layer_norm(X, None, HALF[0])),
    named("layer_norm: weight is on meta and x on cpu", lambda: layer_norm(X, ELSEWHERE[0])),
    named("layer_norm: bias is on meta and x on cpu", lambda: layer_norm(X, None, ELSEWHERE[0])),
    named("layer_norm: residual is on meta and x on cpu", lambda: layer_norm(X, residual=ELSEWHERE)),
]

SWIGLU = [
    named("swiglu: gate has dtype torch.int64; it must be", lambda: swiglu(INTEGERS)),
    named("swiglu: up has dtype torch.int64; it must be", lambda: swiglu(X, INTEGERS)),
    named("swiglu: gate has no dimension; it must be (…, width)", lambda: swiglu(torch.tensor(1.0))),
    named("swiglu: gate has shape (3, 7); without up its last dimension", lambda: swiglu(X[:, :7])),
    named("swiglu: up has shape (3, 4); it must be (3, 8), the shape of gate", lambda: swiglu(X, X[:, :4])),
    named("swiglu: up has shape (8,); it must be (3, 8), the shape of gate", lambda: swiglu(X, X[0])),
    named("swiglu: up has dtype torch.float16 and gate torch.float32", lambda: swiglu(X, HALF)),
    named("swiglu: up is on meta and gate on cpu", lambda: swiglu(X, ELSEWHERE)),
]


def turn(q: torch.Tensor = Q, k: torch.Tensor = K, cos: torch.Tensor = TABLE, sin: Any = None, **options: Any) -> Any:
    return rotary(q, k, cos, cos if sin is None else sin, **options)


ROTARY = [
    named("rotary: q has dtype torch.int64; it must be", lambda: turn(q=Q.long())),
    named("rotary: k has dtype torch.int64; it must be", lambda: turn(k=K.long())),
    named("rotary: cos has dtype torch.int64; it must be", lambda: turn(cos=TABLE.long())),
    named("rotary: sin has dtype torch.int64; it must be", lambda: turn(sin=TABLE.long())),
    named("rotary: q has shape (4, 8); it must be (batch, seq, heads", lambda: turn(q=Q[0, 0])),
    named("rotary: k has shape (3, 2, 8); it must be (2, 3, 2, 8), the shape of q but", lambda: turn(k=K[0])),
    named("rotary: k has shape (2, 2, 2, 8); it must be (2, 3, 2, 8), the shape of q", lambda: turn(k=K[:, :2])),
    named("rotary: k has shape (2, 3, 2, 6); it must be (2, 3, 2, 8), the shape of q", lambda: turn(k=K[..., :6])),
    named("rotary: k has shape (8,); it must be (2, 3, 1, 8)", lambda: turn(k=K[0, 0, 0])),
    named("rotary: k has dtype torch.float16 and q torch.float32", lambda: turn(k=K.half())),
    named("rotary: k is on meta and q on cpu", lambda: turn(k=K.to("meta"))),
    named("rotary: cos has shape (4,); it must be (max_positions, rotary_dim / 2)", lambda: turn(cos=TABLE[0])),
    named("rotary: cos has shape (5, 5); it must be", lambda: turn(cos=torch.zeros(5, 5))),
    named("and rotary_dim at most the head_dim 8", lambda: turn(cos=torch.zeros(5, 8))),
    named("rotary: cos has shape (5, 0); it must be", lambda: turn(cos=TABLE[:, :0])),
    named("rotary: cos has dtype torch.float16 and q torch.float32", lambda: turn(cos=TABLE.half())),
    named("rotary: cos is on meta and q on cpu", lambda: turn(cos=TABLE.to("meta"))),
    named("rotary: sin has shape (5, 3); it must be (5, 4), the shape of cos", lambda: turn(sin=TABLE[:, :3])),
    named("rotary: sin has dtype torch.float16 and cos torch.float32", lambda: turn(sin=TABLE.half())),
    named("rotary: sin is on meta and cos on cpu", lambda: turn(sin=TABLE.to("meta"))),
    named("rotary: cos asks for a gradient", lambda: turn(cos=TABLE.clone().requires_grad_(), sin=TABLE)),
    named("rotary: sin asks for a gradient", lambda: turn(sin=TABLE.clone().requires_grad_())),
    named("rotary: cos has 2 positions and q a sequence of 3", lambda: turn(cos=TABLE[:2])),
    named("rotary: positions has dtype torch.float32; it must be int32", lambda: turn(positions=POSITIONS.float())),
    named("rotary: positions has shape (3,); it must be (2, 3)", lambda: turn(positions=POSITIONS[0])),
    named("rotary: positions is on meta and q on cpu", lambda: turn(positions=POSITIONS.to("meta"))),
    named("rotary_tables: max_positions is 0; it must be at least 1", lambda: rotary_tables(0, 8)),
    named("rotary_tables: rotary_dim is 7; it must be even", lambda: rotary_tables(4, 7)),
    named("rotary_tables: rotary_dim is 0; it must be even and at least 2", lambda: rotary_tables(4, 0)),
    named("rotary_tables: base is -1.0; it must be above 0", lambda: rotary_tables(4, 8, base=-1.0)),
    named("rotary_tables: dtype is torch.int64; it must be", lambda: rotary_tables(4, 8, dtype=torch.int64)),
]


@pytest.mark.parametrize(("call", "message"), LAYER_NORM + SWIGLU + ROTARY)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("position", [-1, 5])
def test_on_cpu_a_position_outside_the_tables_is_refused(position: int) -> None:
    with use("auto"), pytest.raises(ValueError, match=re.escape("outside the tables; it must be 0 … 4")):
        turn(positions=torch.full_like(POSITIONS, position))


@pytest.mark.parametrize("position", [-1, 5, 2**40])
def test_in_the_kernel_a_position_outside_the_tables_makes_its_token_nan_and_no_other(position: int) -> None:
    positions = POSITIONS.clone()
    positions[1, 2] = position
    for out in turn(q=Q + 1, k=K + 1, positions=positions):
        assert out[1, 2].isnan().all()
        assert out.isnan().sum() == out[1, 2].numel()
