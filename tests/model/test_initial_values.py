"""Initial values: the scales they should have, and the same numbers for any part of a parameter drawn alone."""

import pytest
import torch

from tilewright.model import Transformer, from_preset, initialise
from tilewright.model.initial_values import _draw


@pytest.mark.parametrize(("first", "last"), [(0, 200), (0, 7), (63, 65), (64, 128), (130, 200)])
def test_rows_drawn_alone_are_the_rows_of_the_whole(first: int, last: int) -> None:
    whole, part = torch.empty(200, 3), torch.empty(last - first, 3)
    _draw(whole, 0, 0.02, "0/name")
    _draw(part, first, 0.02, "0/name")
    assert torch.equal(part, whole[first:last])


def test_matrices_have_their_standard_deviation_and_projections_back_a_smaller_one() -> None:
    model = Transformer(from_preset("llama-10m", layers=8))
    initialise(model, seed=3)
    weights = dict(model.named_parameters())
    assert weights["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["blocks.7.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["blocks.7.mlp.down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert torch.equal(weights["norm.weight"], torch.ones(320))


def test_seeds_and_parameters_draw_apart() -> None:
    one, same, other = (Transformer(from_preset("llama-10m", layers=1)) for _ in range(3))
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        initialise(model, seed)
    a, b = one.blocks[0].mlp.down.weight, same.blocks[0].mlp.down.weight
    assert torch.equal(a, b)
    assert not torch.equal(a, other.blocks[0].mlp.down.weight)
    assert not torch.equal(one.embedding.weight[:64], one.blocks[0].attention.qkv.weight[:64])


def test_the_rotary_tables_stay_float32_and_hold_the_angles() -> None:
    model = Transformer(from_preset("llama-10m", layers=1))
    initialise(model, 0)
    assert model.cos.dtype == torch.float32
    assert model.cos[1000, 0].item() == pytest.approx(torch.tensor(1000.0, dtype=torch.float64).cos().item(), abs=1e-6)
