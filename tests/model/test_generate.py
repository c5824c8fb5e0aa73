"""Sampling."""

import pytest
import torch

from tilewright.model import Transformer, from_preset, generate, initialise


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = from_preset(
        "llama-10m", vocab_size=50, hidden_size=16, layers=1, heads=2, kv_heads=2, head_dim=8, intermediate_size=24,
        max_sequence_length=8, initial_std=0.5,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, 0)
    return model


def test_temperature_0_takes_the_likeliest_token_each_time(model: Transformer) -> None:
    tokens = generate(model, [3, 4], max_new_tokens=4, temperature=0)
    prefix = [3, 4]
    for token in tokens:
        assert token == int(model(torch.tensor([prefix]))[0, -1].argmax())
        prefix.append(token)


def test_a_seed_draws_the_same_continuation_again_and_another_seed_another(model: Transformer) -> None:
    first, again, other = (generate(model, [1], max_new_tokens=20, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_top_k_1_is_the_likeliest_token_at_any_temperature(model: Transformer) -> None:
    likeliest = generate(model, [1], max_new_tokens=5, temperature=0)
    assert generate(model, [1], max_new_tokens=5, temperature=9.0, top_k=1) == likeliest


def test_the_stop_token_ends_the_continuation_and_is_not_part_of_it(model: Transformer) -> None:
    tokens = generate(model, [1], max_new_tokens=12, temperature=0)
    stop = tokens[2]
    assert generate(model, [1], max_new_tokens=12, temperature=0, stop=stop) == tokens[: tokens.index(stop)]


def test_a_text_longer_than_the_positions_goes_on_from_its_end(model: Transformer) -> None:
    assert len(generate(model, list(range(30)), max_new_tokens=3)) == 3


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [], max_new_tokens=1)
