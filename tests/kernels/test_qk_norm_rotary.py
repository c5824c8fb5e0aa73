"""What the contract cannot see of qk_norm_rotary: that it is what Qwen3 and Gemma-3 do to q and k, rounded once, and
reads and writes little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.kernels.dispatch import use
from tilewright.kernels.opspec import Sample
from tilewright.kernels.qk_norm_rotary import SPEC, qk_norm_rotary
from tilewright.kernels.rms_norm import rms_norm
from tilewright.kernels.rotary import rotary
from tilewright.kernels.rotary_tables import rotary_tables

both = pytest.mark.parametrize("implementation", ["triton", "reference"])


def q_and_k(*lead: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 32) -> tuple[torch.Tensor, ...]:
    """q, k and their weights."""
    return (
        torch.randn(*lead, heads, head_dim),
        torch.randn(*lead, kv_heads, head_dim),
        torch.randn(head_dim),
        torch.randn(head_dim),
    )


def gradients(results: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Of the results' products with fixed random tensors."""
    torch.manual_seed(1)
    return torch.autograd.grad(results, inputs, [torch.randn(r.shape).to(r.dtype) for r in results])


@both
@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_it_is_what_the_models_of_transformers_do(family: str, implementation: str) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q, k, q_weight, k_weight = inputs = tuple(x.requires_grad_() for x in q_and_k(2, 5))
    norms = [(Qwen3RMSNorm if family == "Qwen3" else Gemma3RMSNorm)(32, eps=1e-5) for _ in range(2)]
    for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
        norm.weight = torch.nn.Parameter(weight.detach().clone())
    tables = rotary_tables(90, 32)
    positions = torch.randint(0, 90, (2, 5))
    cos, sin = (torch.cat((table, table), dim=-1)[positions] for table in tables)
    theirs = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin, unsqueeze_dim=2)
    offset = 0.0 if family == "Qwen3" else 1.0
    with use(implementation):
        ours = qk_norm_rotary(*inputs, *tables, eps=1e-5, weight_offset=offset, positions=positions)
        our_gradients = gradients(ours, inputs)
    expected = gradients(theirs, (q, k, norms[0].weight, norms[1].weight))
    for got, want in zip((*ours, *our_gradients), (*theirs, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@both
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_past_the_rotary_dimensions_is_normalised_and_not_turned(
    interleaved: bool, implementation: str
) -> None:
    q, k, q_weight, k_weight = q_and_k(3, head_dim=21)
    with use(implementation):
        outs = qk_norm_rotary(q, k, q_weight, k_weight, *rotary_tables(3, 10), interleaved=interleaved)
        normed = (rms_norm(q, q_weight), rms_norm(k, k_weight))
        turned = rotary(*normed, *rotary_tables(3, 10), interleaved=interleaved)
    for out, norm, turn in zip(outs, normed, turned, strict=True):
        torch.testing.assert_close(out[..., 10:], norm[..., 10:])
        torch.testing.assert_close(out[..., :10], turn[..., :10])
        assert not torch.allclose(out[1:, :, :10], norm[1:, :, :10], atol=0.1)


def test_16_bit_heads_with_float32_weights_and_tables_are_rounded_once() -> None:
    q, k, q_weight, k_weight = q_and_k(6)
    q, k = q.half(), k.half()
    tables = rotary_tables(6, 32)
    outs = qk_norm_rotary(q, k, q_weight, k_weight, *tables)
    wide = qk_norm_rotary(q.float(), k.float(), q_weight, k_weight, *tables)
    for out, exact in zip(outs, wide, strict=True):
        assert out.dtype == torch.float16
        assert torch.equal(out, exact.half())


def test_gradients_of_float32_weights_are_summed_and_kept_in_float32() -> None:
    q, k, q_weight, k_weight = q_and_k(2, 20)
    half = (q.half().requires_grad_(), k.half().requires_grad_(), q_weight.requires_grad_(), k_weight.requires_grad_())
    exact = tuple(x.detach().double().requires_grad_() for x in half)
    tables = rotary_tables(20, 32)
    upstream = [torch.randn(x.shape).half() for x in (q, k)]
    got = torch.autograd.grad(qk_norm_rotary(*half, *tables), half, upstream)
    with use("reference"):
        results = qk_norm_rotary(*exact, *(table.double() for table in tables))
        expected = torch.autograd.grad(results, exact, [g.double() for g in upstream])
    assert [g.dtype for g in got] == [x.dtype for x in half]
    for gradient, want in zip(got[2:], expected[2:], strict=True):
        # Were it summed or stored in float16, it would be off by a thousandth.
        torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-5)


def test_a_result_that_is_not_used_gives_no_gradient() -> None:
    inputs = tuple(x.requires_grad_() for x in q_and_k(3))
    q_out, _ = qk_norm_rotary(*inputs, *rotary_tables(3, 32))
    dq, dk, dq_weight, dk_weight = gradients((q_out,), inputs)
    assert dq.any()
    assert dq_weight.any()
    assert not dk.any()
    assert not dk_weight.any()


def test_nothing_is_kept_for_the_backward_pass_but_the_inputs() -> None:
    inputs = tuple(x.requires_grad_() for x in q_and_k(2, 3))
    tables = rotary_tables(3, 32)
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        qk_norm_rotary(*inputs, *tables)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*inputs, *tables)}


def test_a_position_outside_the_tables_is_seen_in_the_weights_gradients_too() -> None:
    inputs = tuple(x.requires_grad_() for x in q_and_k(3))
    outs = qk_norm_rotary(*inputs, *rotary_tables(5, 32), positions=torch.tensor([0, 5, 1]))
    dq, dk, dq_weight, dk_weight = gradients(outs, inputs)
    for gradient in (dq, dk):
        assert gradient[1].isnan().all()
        assert not gradient[[0, 2]].isnan().any()
    assert dq_weight.isnan().all()
    assert dk_weight.isnan().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "options"),
    [
        pytest.param(32, 8, 128, {}, id="Qwen3-8B"),
        pytest.param(16, 8, 256, {"weight_offset": 1.0}, id="Gemma-3-12B"),
        pytest.param(16, 8, 128, {"interleaved": True}, id="Qwen3-0.6B-interleaved"),
    ],
)
def test_q_and_k_are_read_and_written_once_in_either_pass(
    heads: int, kv_heads: int, head_dim: int, options: dict[str, Any], issued: Callable[[], int]
) -> None:
    lead = (2, 40)  # 80 tokens for the interpreter's few programs, about as many a program as 4,096 on a GPU
    q, k, q_weight, k_weight = q_and_k(*lead, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    cos, sin = rotary_tables(lead[1], head_dim)
    positions = torch.arange(lead[1]).expand(lead)
    inputs = (
        q.half().requires_grad_(),
        k.half().requires_grad_(),
        q_weight.requires_grad_(),
        k_weight.requires_grad_(),
    )
    tensors = dict(zip(("q", "k", "q_weight", "k_weight"), inputs, strict=True))
    sample = Sample("", {**tensors, "cos": cos, "sin": sin, "positions": positions}, options)

    results = qk_norm_rotary(**sample.tensors, **options)
    forward, backward = (work.bytes for work in SPEC.work(sample)[:2])
    assert forward <= issued() <= 1.05 * forward

    gradients(results, inputs)
    assert backward <= issued() <= 1.05 * backward
