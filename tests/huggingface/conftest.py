"""Tiny random models of each family, and what is asked of them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tilewright.kernels.huggingface import attention_registry

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# Windows of 5 in sequences of 11, so that they count.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE),
    "qwen2": ("Qwen2Config", _SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", _SHAPE | {"head_dim": 16}),
    "mistral": ("MistralConfig", _SHAPE | {"sliding_window": 5}),
    "gemma2": ("Gemma2Config", _SHAPE | _HEADS),
    "gemma3": ("Gemma3TextConfig", _SHAPE | _HEADS),
    "phi3": ("Phi3Config", _SHAPE),
    "gpt2": ("GPT2Config", _GPT2 | _NO_DROPOUT),
    "bert": ("BertConfig", {k: _SHAPE[k] for k in list(_SHAPE)[:5]} | _BERT_NO_DROPOUT),
    # Known by structure alone.
    "granite": ("GraniteConfig", _SHAPE | {"logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "stablelm": ("StableLmConfig", _SHAPE | {"partial_rotary_factor": 0.25}),
    "olmo2": ("Olmo2Config", _SHAPE),
    "cohere": ("CohereConfig", _SHAPE),
    "gpt_oss": ("GptOssConfig", _SHAPE | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 5}),
    "qwen2_moe": ("Qwen2MoeConfig", _SHAPE | _EXPERTS | {"use_sliding_window": True, "sliding_window": 5}),
}
# Whose layers are called in another way than those above.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        {k: _SHAPE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "t5": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
}
NAMED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "bert")


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights, none of them at the ones and zeros they are usually made with."""
    configuration, options = (CONFIGURATIONS | OTHERS)[family]
    config = getattr(transformers, configuration)(**(options | changes))
    kinds = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    kind = kinds.get(family, transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    model: PreTrainedModel = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pair() -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """The same model twice, to patch one of the two."""

    def make(family: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
        model = build(family, **changes)
        return model, copy.deepcopy(model)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call that our attention serves; what PyTorch computes instead leaves no trace here."""
    calls: list[dict[str, Any]] = []
    ours = attention_registry.attention

    def spy(*tensors: torch.Tensor, **options: Any) -> Any:
        calls.append(options)
        return ours(*tensors, **options)

    monkeypatch.setattr(attention_registry, "attention", spy)
    return calls


@pytest.fixture
def assert_agree() -> Callable[..., None]:
    """Two models give the same outputs and the same gradients of every parameter."""

    def check(one: PreTrainedModel, other: PreTrainedModel, **arguments: Any) -> None:
        outputs, close = [], {"rtol": 1e-4, "atol": 1e-5}
        for model in (one, other):
            model.zero_grad()
            output = model(**arguments)
            (output.logits.square().mean() if output.loss is None else output.loss).backward()
            outputs.append(output)
        if "labels" in arguments:
            torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **close)
        if outputs[1].logits is not None:
            torch.testing.assert_close(outputs[1].logits, outputs[0].logits, **close)
        theirs, ours = (dict(model.named_parameters()) for model in (one, other))
        assert theirs.keys() == ours.keys()
        for name, parameter in theirs.items():
            if parameter.grad is None:
                assert ours[name].grad is None, name
                continue
            torch.testing.assert_close(
                ours[name].grad, parameter.grad, **close, msg=lambda text, name=name: f"{name}: {text}"
            )

    return check
