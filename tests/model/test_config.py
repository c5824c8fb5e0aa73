"""Presets have the published sizes, and shapes that do not fit are refused by name."""

import pytest
import torch

from tilewright.model import PRESETS, ModelConfigError, Transformer, from_preset

# Parameter counts as their authors' checkpoints have them, on the Hugging Face hub.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "llama-3-8b": 8_030_261_248,
}


@pytest.mark.parametrize(("preset", "parameters"), PUBLISHED.items())
def test_a_preset_has_as_many_parameters_as_the_published_model(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_matmul_parameters_are_those_of_the_linear_layers_and_the_head() -> None:
    for config in PRESETS.values():
        with torch.device("meta"):
            model = Transformer(config)
        linear = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
        assert config.matmul_parameters() == linear + config.vocab_size * config.hidden_size


def test_flops_of_llama_3_8b_are_the_textbooks() -> None:
    # 6 · (8.03e9 − the input embedding's 0.525e9) + 12 · 32 layers · 4096 · 8192 tokens
    assert PRESETS["llama-3-8b"].flops_per_token(8192) == 6 * 7_504_658_432 + 12 * 32 * 4096 * 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5, "kv_heads": 2}, r"model.heads is 5, which model.kv_heads \(2\) does not divide"),
        ({"head_dim": 15}, "model.head_dim is 15; rotary positions need an even one"),
        ({"head_dim": 512}, "the attention kernels take up to 256"),
        ({"layers": 0}, "model.layers is 0; it must be 1 or more"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        from_preset("llama-10m", **changes)


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ModelConfigError, match=r"model.preset is 'lama'; there are llama-10m, "):
        from_preset("lama")
