"""Rotary tables and the rules for long contexts, each against a formula in other words and against transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.kernels import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryScaling,
    YarnScaling,
    rotary,
    rotary_tables,
)

# rotary_dim, base, our rule and transformers' words for it: those of Qwen2.5 (YaRN), DeepSeek-V2 (YaRN with mscale) and
# Llama 3.1, every option, and bands that end outside the pairs.
CASES: dict[str, tuple[int, float, RotaryScaling, dict[str, Any]]] = {
    "linear": (128, 10000.0, LinearScaling(factor=8.0), {"rope_type": "linear", "factor": 8.0}),
    "dynamic, short": (
        128, 5e6, DynamicNTKScaling(factor=2.0, original_max_positions=4096, sequence_length=1000),
        {"rope_type": "dynamic", "factor": 2.0, "sequence_length": 1000, "max_position_embeddings": 4096},
    ),
    "dynamic, long": (
        128, 5e6, DynamicNTKScaling(factor=2.0, original_max_positions=4096, sequence_length=10000),
        {"rope_type": "dynamic", "factor": 2.0, "sequence_length": 10000, "max_position_embeddings": 4096},
    ),
    "yarn": (
        128, 1e6, YarnScaling(factor=4.0, original_max_positions=32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn, mscale": (
        64, 10000.0, YarnScaling(factor=40.0, original_max_positions=4096, mscale=1.3, mscale_all_dim=0.707),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.3,
         "mscale_all_dim": 0.707},
    ),
    "yarn, all options": (
        80, 500.0, YarnScaling(factor=2.5, original_max_positions=1000, beta_fast=20.0, beta_slow=2.0,
                               attention_factor=1.75, truncate=False),
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 1000, "beta_fast": 20.0,
         "beta_slow": 2.0, "attention_factor": 1.75, "truncate": False},
    ),
    "yarn, every pair slow": (
        64, 1e8, YarnScaling(factor=16.0, original_max_positions=16),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16},
    ),
    "yarn, every pair fast": (
        64, 2.0, YarnScaling(factor=16.0, original_max_positions=100_000),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 100_000},
    ),
    "llama3": (
        128, 500_000.0, Llama3Scaling(factor=8.0),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ),
    "llama3, other bands": (
        64, 10000.0, Llama3Scaling(factor=32.0, original_max_positions=2048, low_freq_factor=2.0, high_freq_factor=9.0),
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0,
         "original_max_position_embeddings": 2048},
    ),
}  # fmt: skip


def frequencies_and_amplitude(
    rotary_dim: int, base: float, scaling: RotaryScaling | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tables say: the angle of position 1 and the length of each (cos, sin)."""
    cos, sin = rotary_tables(2, rotary_dim, base=base, scaling=scaling, dtype=torch.float64)
    return torch.atan2(sin[1], cos[1]), torch.hypot(sin, cos)


@pytest.mark.parametrize("name", CASES)
def test_every_rule_is_that_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary_dim, base, scaling, parameters = CASES[name]
    parameters = dict(parameters)
    length = parameters.pop("sequence_length", None)
    config = LlamaConfig(
        hidden_size=rotary_dim,
        num_attention_heads=1,
        head_dim=rotary_dim,
        max_position_embeddings=parameters.pop("max_position_embeddings", 131_072),
        rope_parameters={"rope_theta": base, **parameters},
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    got, lengths = frequencies_and_amplitude(rotary_dim, base, scaling)
    # Theirs are float32 throughout; ours are float64.
    torch.testing.assert_close(got.float(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(lengths, torch.full_like(lengths, amplitude), rtol=1e-12, atol=0)


def test_linear_scaling_interpolates_positions() -> None:
    for ours, plain in zip(
        rotary_tables(41, 32, scaling=LinearScaling(factor=8.0), dtype=torch.float64),
        rotary_tables(6, 32, dtype=torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours[::8], plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "growth"),
    [
        (NTKScaling(factor=4.0), 4.0),
        (DynamicNTKScaling(factor=4.0, original_max_positions=100, sequence_length=99), 1.0),
        (DynamicNTKScaling(factor=4.0, original_max_positions=100, sequence_length=100), 1.0),
        (DynamicNTKScaling(factor=4.0, original_max_positions=100, sequence_length=150), 3.0),
        (DynamicNTKScaling(factor=1.0, original_max_positions=100, sequence_length=250), 2.5),
    ],
)
def test_ntk_scaling_raises_the_base(scaling: RotaryScaling, growth: float) -> None:
    raised = 10000.0 * growth ** (32 / (32 - 2))
    for ours, plain in zip(
        rotary_tables(200, 32, scaling=scaling, dtype=torch.float64),
        rotary_tables(200, 32, base=raised, dtype=torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_static_ntk_scaling_leaves_the_fastest_pair_alone_and_interpolates_the_slowest() -> None:
    plain, _ = frequencies_and_amplitude(64, 10000.0, None)
    scaled, _ = frequencies_and_amplitude(64, 10000.0, NTKScaling(factor=7.0))
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled[-1], plain[-1] / 7, rtol=1e-12, atol=0)


def test_yarn_blends_between_the_pairs_that_turn_32_times_and_once() -> None:
    base, positions, factor, half = 10000.0, 2048, 16.0, 64
    scaled, amplitude = frequencies_and_amplitude(
        2 * half, base, YarnScaling(factor=factor, original_max_positions=positions)
    )
    turns = [positions * base ** (-i / half) / (2 * math.pi) for i in range(half)]
    first = max(i for i in range(half) if turns[i] >= 32)
    last = min(i for i in range(half) if turns[i] <= 1)
    assert (first, last) == (16, 41)
    for i in range(half):
        frequency = base ** (-i / half)
        interpolated = min(max((i - first) / (last - first), 0.0), 1.0)
        expected = interpolated * frequency / factor + (1 - interpolated) * frequency
        assert scaled[i].item() == pytest.approx(expected, rel=1e-12)
    assert amplitude[1, 5].item() == pytest.approx(0.1 * math.log(16) + 1, rel=1e-12)


def test_yarns_amplitude_scales_q_and_k_and_their_products_by_its_square() -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    scaling = YarnScaling(factor=4.0, original_max_positions=64, attention_factor=1.5)
    alone = YarnScaling(factor=4.0, original_max_positions=64, attention_factor=1.0)
    louder = rotary(q, k, *rotary_tables(3, 8, scaling=scaling))
    for loud, plain in zip(louder, rotary(q, k, *rotary_tables(3, 8, scaling=alone)), strict=True):
        torch.testing.assert_close(loud, 1.5 * plain)


def test_llama_3_divides_long_wavelengths_and_keeps_short_ones() -> None:
    base, half, factor, positions = 500_000.0, 64, 8.0, 8192
    scaled, amplitude = frequencies_and_amplitude(2 * half, base, Llama3Scaling(factor=factor))
    kinds = set()
    for i in range(half):
        frequency = base ** (-i / half)
        wavelength = 2 * math.pi / frequency
        if wavelength < positions / 4:
            kind, expected = "kept", frequency
        elif wavelength > positions / 1:
            kind, expected = "divided", frequency / factor
        else:
            smooth = (positions / wavelength - 1) / (4 - 1)
            kind, expected = "blended", (1 - smooth) * frequency / factor + smooth * frequency
        kinds.add(kind)
        assert scaled[i].item() == pytest.approx(expected, rel=1e-12)
    assert kinds == {"kept", "divided", "blended"}
    torch.testing.assert_close(amplitude, torch.ones_like(amplitude), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", [rule for _, _, rule, _ in CASES.values()] + [NTKScaling(factor=3.0)])
def test_tables_are_rounded_once_from_float64(scaling: RotaryScaling) -> None:
    exact = rotary_tables(50, 64, base=1e6, scaling=scaling, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rounded, table in zip(rotary_tables(50, 64, base=1e6, scaling=scaling, dtype=dtype), exact, strict=True):
            assert torch.equal(rounded, table.to(dtype))


def test_tables_hold_the_cosines_of_float64_angles() -> None:
    cos, sin = rotary_tables(100_001, 6, base=500_000.0)
    assert cos.shape == sin.shape == (100_001, 3)
    angle = 100_000 * 500_000.0 ** (-2 / 6)
    # Rounded to float32, the angle alone could be off by 6e-5.
    assert abs(cos[100_000, 1].item() - math.cos(angle)) < 6e-8
    assert abs(sin[100_000, 1].item() - math.sin(angle)) < 6e-8
    assert torch.equal(cos[0], torch.ones(3))
    assert torch.equal(sin[0], torch.zeros(3))


def refused(message: str, call: Callable[[], Any]) -> Any:
    return pytest.param(call, message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message)[:70])


def yarn(**options: Any) -> YarnScaling:
    return YarnScaling(**{"factor": 4.0, "original_max_positions": 64, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        refused("rotary_tables: max_positions is 0; it must be at least 1", lambda: rotary_tables(0, 8)),
        refused("rotary_tables: rotary_dim is 7; it must be even", lambda: rotary_tables(4, 7)),
        refused("rotary_tables: rotary_dim is 0; it must be even and at least 2", lambda: rotary_tables(4, 0)),
        refused("rotary_tables: base is -1.0; it must be above 0", lambda: rotary_tables(4, 8, base=-1.0)),
        refused("rotary_tables: base is nan; it must be above 0", lambda: rotary_tables(4, 8, base=math.nan)),
        refused("rotary_tables: base is inf; it must be above 0", lambda: rotary_tables(4, 8, base=math.inf)),
        refused("rotary_tables: scaling is 4.0; it must be a", lambda: rotary_tables(4, 8, scaling=4.0)),  # type: ignore[arg-type]
        refused("rotary_tables: dtype is torch.int64; it must be", lambda: rotary_tables(4, 8, dtype=torch.int64)),
        refused(
            "rotary_tables: rotary_dim is 2; NTK scaling spreads over pairs and needs at least 4",
            lambda: rotary_tables(4, 2, scaling=NTKScaling(factor=2.0)),
        ),
        refused(
            "YarnScaling: base is 1.0; it must be above 1", lambda: rotary_tables(4, 8, base=1.0, scaling=yarn())
        ),
        refused("LinearScaling: factor is 0.5; it must be at least 1", lambda: LinearScaling(factor=0.5)),
        refused("NTKScaling: factor is nan; it must be at least 1", lambda: NTKScaling(factor=math.nan)),
        refused("NTKScaling: factor is inf; it must be at least 1", lambda: NTKScaling(factor=math.inf)),
        refused("Llama3Scaling: factor is 0; it must be at least 1", lambda: Llama3Scaling(factor=0)),
        refused(
            "DynamicNTKScaling: original_max_positions is 0; it must be at least 1",
            lambda: DynamicNTKScaling(factor=2.0, original_max_positions=0, sequence_length=9),
        ),
        refused(
            "DynamicNTKScaling: sequence_length is -1; it must be at least 1",
            lambda: DynamicNTKScaling(factor=2.0, original_max_positions=9, sequence_length=-1),
        ),
        refused("YarnScaling: factor is 0.0; it must be at least 1", lambda: yarn(factor=0.0)),
        refused("YarnScaling: original_max_positions is 0; it must", lambda: yarn(original_max_positions=0)),
        refused("YarnScaling: beta_slow is 0.0; it must be above 0", lambda: yarn(beta_slow=0.0)),
        refused("YarnScaling: beta_fast is 0.5; it must be above beta_slow (1.0)", lambda: yarn(beta_fast=0.5)),
        refused("YarnScaling: attention_factor is 0.0; it must be above 0", lambda: yarn(attention_factor=0.0)),
        refused("YarnScaling: mscale is -1.0; it must be above 0", lambda: yarn(mscale=-1.0, mscale_all_dim=1.0)),
        refused("YarnScaling: mscale_all_dim is 0.0; it must be", lambda: yarn(mscale=1.0, mscale_all_dim=0.0)),
        refused("YarnScaling: mscale is 1.0 and mscale_all_dim None; give both or neither", lambda: yarn(mscale=1.0)),
        refused(
            "YarnScaling: attention_factor is 1.2 and mscale 1.0; give one of them",
            lambda: yarn(mscale=1.0, mscale_all_dim=1.0, attention_factor=1.2),
        ),
        refused("Llama3Scaling: original_max_posit", lambda: Llama3Scaling(factor=8.0, original_max_positions=0)),
        refused("Llama3Scaling: low_freq_factor is 0.0", lambda: Llama3Scaling(factor=8.0, low_freq_factor=0.0)),
        refused(
            "Llama3Scaling: high_freq_factor is 1.0; it must be above low_freq_factor (1.0)",
            lambda: Llama3Scaling(factor=8.0, high_freq_factor=1.0),
        ),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
