"""A patched model of transformers is the same model: what it computes, saves and loads; and `unpatch` gives it back."""

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from tilewright.kernels import patch, unpatch, use

from .conftest import CONFIGURATIONS, NAMED, build

PADDED_LEFT = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 11])
PADDED_RIGHT = torch.tensor([[1] * 11, [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_logits_and_gradients_agree_with_the_unpatched_model(family, pair, tokens, assert_agree):
    theirs, ours = pair(family)
    patch(ours)
    assert_agree(theirs, ours, input_ids=tokens)
    for padding in (PADDED_LEFT, PADDED_RIGHT):
        assert_agree(theirs, ours, input_ids=tokens, attention_mask=padding)


@pytest.mark.parametrize("family", CONFIGURATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_its_gradients_agree_with_the_unpatched_model(family, training, pair, tokens, assert_agree):
    theirs, ours = (model.train(training) for model in pair(family))
    patch(ours)
    labels = tokens.masked_fill(PADDED_RIGHT == 0, -100)
    assert_agree(theirs, ours, input_ids=tokens, attention_mask=PADDED_RIGHT, labels=labels)
    if family != "bert":  # whose loss takes no count
        assert_agree(theirs, ours, input_ids=tokens, labels=labels, num_items_in_batch=torch.tensor(23))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_the_triton_kernels_agree_with_the_unpatched_model(family, pair, tokens, assert_agree):
    theirs, ours = pair(family)
    patch(ours)
    with use("triton"):
        assert_agree(theirs, ours, input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("family", [*(name for name in NAMED if name != "bert"), "gpt_oss"])
@pytest.mark.parametrize("padding", [torch.ones_like(PADDED_LEFT), PADDED_LEFT], ids=["whole", "padded"])
def test_greedy_generation_gives_the_same_tokens(family, padding, pair, tokens):
    theirs, ours = (model.eval() for model in pair(family))
    patch(ours)
    options = {"attention_mask": padding, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert ours.generate(tokens, **options).tolist() == theirs.generate(tokens, **options).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_generation_with_a_static_cache_gives_the_same_tokens(family, pair, tokens):
    theirs, ours = (model.eval() for model in pair(family))
    patch(ours)
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert ours.generate(tokens, **options).tolist() == theirs.generate(tokens, **options).tolist()


@pytest.mark.parametrize("family", NAMED)
def test_a_patched_model_saves_what_an_unpatched_one_loads(family, pair, tokens, tmp_path):
    theirs, ours = (model.eval() for model in pair(family))
    patch(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.save_pretrained(tmp_path)
    loaded = type(theirs).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == theirs.config._attn_implementation
    torch.testing.assert_close(loaded(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", NAMED)
def test_unpatch_restores_the_model_to_the_bit(family, pair, tokens):
    theirs, ours = pair(family)
    before = {name: set(vars(module)) for name, module in ours.named_modules()}
    implementation = ours.config._attn_implementation
    patch(ours)
    assert ours.config._attn_implementation == "tilewright"
    unpatch(ours)
    assert ours.config._attn_implementation == implementation
    assert {name: set(vars(module)) for name, module in ours.named_modules()} == before
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    patch(ours)  # and again


def test_bfloat16_logits_agree_to_its_rounding(pair, tokens):
    theirs, ours = (model.to(torch.bfloat16).eval() for model in pair("gemma3"))
    patch(ours)
    exact = build("gemma3").eval()(tokens).logits
    error_of_theirs = (theirs(tokens).logits - exact).abs().max()
    assert (ours(tokens).logits - exact).abs().max() < 2 * error_of_theirs


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_under_autocast_logits_and_loss_agree_to_its_rounding(family, pair, tokens):
    theirs, ours = (model.train() for model in pair(family))
    patch(ours)
    exact = theirs(tokens, labels=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, loss, logits = theirs(tokens, labels=tokens), ours(tokens, labels=tokens).loss, ours(tokens).logits
    assert (logits - exact.logits).abs().max() < 2 * (expected.logits - exact.logits).abs().max()
    torch.testing.assert_close(loss, exact.loss, rtol=1e-2, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dropout_in_training_is_the_same(family, pair, tokens):
    theirs, ours = (model.train() for model in pair(family, attention_dropout=0.5))
    report = patch(ours)
    assert ("qk_norm_rotary" in {row.by for row in report.replaced}) == (family == "qwen3")
    logits = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0])


def test_a_copy_of_a_patched_model_uses_its_own_weights(tokens):
    model = build("qwen3").eval()
    patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(tokens).logits, build("qwen3").eval()(tokens).logits)
    unpatch(twin)


def test_a_pickled_model_loads_where_nothing_is_registered_and_is_patched_anew(tokens, monkeypatch):
    model = build("llama").eval()
    expected = model(tokens).logits
    patch(model)
    pickled = pickle.dumps(model)
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "tilewright")  # as in a process that only loads
    loaded = pickle.loads(pickled)
    torch.testing.assert_close(loaded(tokens).logits, expected)
    unpatch(loaded)
    assert torch.equal(loaded(tokens).logits, expected)
    assert not patch(loaded).left


def test_only_the_given_instance_changes(pair):
    theirs, ours = pair("llama")
    patch(ours)
    assert all("forward" not in vars(module) for module in theirs.modules())
    assert theirs.config._attn_implementation == "sdpa"


def test_training_with_labels_makes_no_logits(tokens):
    model = build("llama").train()
    patch(model)
    assert model(tokens, labels=tokens).logits is None
    assert model(tokens).logits.shape == (2, 11, 97)
    assert model.eval()(tokens, labels=tokens).logits.shape == (2, 11, 97)
    unpatch(model)
    patch(model.train(), fused_head=False)
    assert model(tokens, labels=tokens).logits.shape == (2, 11, 97)


def test_the_fused_head_steps_aside_for_what_it_was_not_compared_on(pair, tokens):
    theirs, ours = (model.train() for model in pair("qwen2_moe"))
    patch(ours)
    assert ours(tokens, labels=tokens).logits is None
    with_router = {"labels": tokens, "output_router_logits": True}
    torch.testing.assert_close(ours(tokens, **with_router).loss, theirs(tokens, **with_router).loss)
    assert ours(tokens, labels=tokens, logits_to_keep=tokens.shape[1]).logits is not None
    assert len(ours(tokens, labels=tokens, return_dict=False)) == len(theirs(tokens, labels=tokens, return_dict=False))
    ours.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    torch.testing.assert_close(ours(tokens, labels=tokens).loss, ours(tokens).logits.sum())


def test_the_fused_head_steps_aside_for_a_head_that_was_wrapped_since(pair, tokens):
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.base(x, **kwargs) + 1.0

    theirs, ours = (model.train() for model in pair("llama"))
    patch(ours)
    for model in (theirs, ours):
        model.lm_head = Adapter(model.lm_head)
    torch.testing.assert_close(ours(tokens, labels=tokens).loss, theirs(tokens, labels=tokens).loss)


class Coded(torch.Tensor):
    """A weight that keeps something else than its numbers, as quantised ones do, and knows linear layers alone."""

    codes: torch.Tensor

    @staticmethod
    def __new__(cls, codes):
        coded = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=codes.dtype)
        coded.codes = codes
        return coded

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(tensors, meta, size, stride):
        return Coded(tensors["codes"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        codes = torch.utils._pytree.tree_map_only(cls, lambda coded: coded.codes, (args, kwargs or {}))
        result = func(*codes[0], **codes[1])
        return cls(result) if func is torch.ops.aten.detach.default else result


def test_the_fused_head_steps_aside_for_a_weight_that_was_quantised(pair, tokens):
    theirs, ours = (model.train() for model in pair("llama"))
    patch(ours)
    ours.lm_head.weight = nn.Parameter(Coded(ours.lm_head.weight.detach()), requires_grad=False)
    torch.testing.assert_close(ours(tokens, labels=tokens).loss, theirs(tokens, labels=tokens).loss)
    unpatch(ours)
    assert [(row.what, row.why) for row in patch(ours).left] == [
        ("loss of LlamaForCausalLM", "has a head whose weight is of type Coded")
    ]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("opt", "reaches into its body instead of calling it"),
        ("t5", "has an encoder and a decoder, and so another loss than that of a causal language model"),
    ],
)
def test_the_report_says_why_a_loss_is_left_alone(family, why):
    assert why in {row.why for row in patch(build(family)).left}


def test_the_report_names_what_was_replaced_and_what_was_not():
    report = patch(build("gpt2"))
    replaced = {(row.what, row.by) for row in report.replaced}
    assert ("LayerNorm", "layer_norm") in replaced
    assert ("GPT2Attention", 'attention, as "tilewright"') in replaced
    assert {row.module for row in report.left} == {"transformer.h.0.mlp", "transformer.h.1.mlp"}
    assert "LayerNorm → layer_norm   [transformer.h.0.ln_1, … (5)]" in str(report)
    assert "GPT2MLP: is no gated MLP" in str(report)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"rms_norm", "swiglu", "rotary"}),
        ("qwen3", {"rms_norm", "swiglu", "qk_norm_rotary"}),
        ("gemma3", {"rms_norm(weight_offset=1.0)", 'geglu(approximate="tanh")', "qk_norm_rotary"}),
        ("olmo2", {"rms_norm", "swiglu", "rotary"}),  # norms all heads together
        ("gemma2", {"rms_norm(weight_offset=1.0)", 'geglu(approximate="tanh")', "rotary"}),
        ("phi3", {"rms_norm", "swiglu", "rotary"}),
        ("granite", {"rms_norm", "swiglu", "rotary"}),
        ("stablelm", {"layer_norm", "swiglu", "rotary"}),
        ("cohere", {"layer_norm", "swiglu", "rotary(interleaved=True)"}),
    ],
)
def test_nothing_of_a_known_shape_is_left_alone(family, expected):
    report = patch(build(family))
    assert not report.left
    kernels = {"linear_cross_entropy, in training", 'attention, as "tilewright"'}
    assert {row.by for row in report.replaced} == expected | kernels


def test_modules_that_compute_something_else_are_left_alone(pair, tokens, assert_agree):
    def scaled(self, hidden_states):
        return 1.01 * type(self).__base__.forward(self, hidden_states)

    theirs, ours = pair("llama", hidden_act="relu")
    for model in (theirs, ours):
        norm = model.model.norm
        norm.__class__ = type("ScaledRMSNorm", (type(norm),), {"forward": scaled})
        first = model.model.layers[0].input_layernorm
        first.forward = MethodType(lambda self, x: 2.0 * type(self).forward(self, x), first)
    report = patch(ours)
    why = {row.module: row.why for row in report.left}
    assert why == {
        "model.norm": "gives other numbers than rms_norm and layer_norm",
        "model.layers.0.input_layernorm": "has a forward of its own, from a hook or another patch",
        "model.layers.0.mlp": "gives other numbers than swiglu and geglu",
        "model.layers.1.mlp": "gives other numbers than swiglu and geglu",
    }
    assert_agree(theirs, ours, input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("attribute", ["scaling", "attention_dropout", "sliding_window"])
def test_a_layer_that_hands_on_other_arguments_is_not_written_anew(attribute):
    """Of a layer with norms on q and k, all that it calls is compared, not its result alone."""
    model = build("qwen3")
    layer = model.model.layers[0].self_attn
    values = iter(range(1, 100))  # another value each time it is read
    layer.__class__ = type("Qwen3Attention", (type(layer),), {attribute: property(lambda self: next(values))})
    by = {row.module: row.by for row in patch(model, attention=False).replaced}
    assert by["model.layers.0.self_attn.q_norm"] == "rms_norm"
    assert by["model.layers.1.self_attn"] == "qk_norm_rotary"
    assert by.get("model.layers.0.self_attn") != "qk_norm_rotary"


def test_a_head_with_other_numbers_is_left_alone(pair, tokens):
    theirs, ours = pair("gemma2")
    for model in (theirs, ours):
        model.config.final_logit_softcapping = None  # read by the model when it runs, and by us
        kind = type(model)

        def softcapped(self, *args, kind=kind, **kwargs):
            output = kind.forward(self, *args, **kwargs)
            return type(output)(loss=1.01 * output.loss if output.loss is not None else None, logits=output.logits)

        softcapped.__signature__ = inspect.signature(kind.forward)
        model.__class__ = type(kind.__name__, (kind,), {"forward": softcapped})
    report = patch(ours)
    (reason,) = (row.why for row in report.left)
    assert reason.startswith("has a loss of")
    torch.testing.assert_close(ours(tokens, labels=tokens).loss, theirs(tokens, labels=tokens).loss)


def test_parts_that_are_turned_off_stay(tokens):
    report = patch(build("llama"), attention=False, rotary=False, norms=False, mlps=False)
    assert [row.by for row in report.replaced] == ["linear_cross_entropy, in training"]


def test_a_model_compiles_in_one_graph(pair, tokens):
    theirs, ours = (model.train() for model in pair("qwen3"))
    patch(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss)


def test_gradient_checkpointing_gives_the_same_gradients(pair, tokens, assert_agree):
    theirs, ours = (model.train() for model in pair("mistral"))
    patch(ours)
    ours.gradient_checkpointing_enable()
    assert_agree(theirs, ours, input_ids=tokens, labels=tokens)


def test_patching_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match=r"patch: model is a Linear; it must be a transformers.PreTrainedModel"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"unpatch: model is a Linear"):
        unpatch(nn.Linear(2, 2))


def test_patching_twice_and_unpatching_what_is_not_patched_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="unpatch: the model is not patched"):
        unpatch(model)
    patch(model)
    with pytest.raises(ValueError, match=r"patched already; unpatch\(model\) first"):
        patch(model)


def test_unpatching_under_a_later_hook_is_refused():
    model = build("llama")
    patch(model)
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match="of 11 patched modules 10 still run what patch gave them"):
        unpatch(model)


def test_a_head_that_was_exchanged_since_does_not_keep_the_rest_from_being_undone(tokens):
    model = build("llama").eval()
    before = model(tokens).logits
    patch(model)
    model.resize_token_embeddings(120)
    unpatch(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(tokens).logits[..., :97], before)


def test_what_accelerate_wraps_is_unwrapped_to_the_patched_model(tokens):
    model = build("llama").train()
    patch(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    wrapped = accelerator.prepare_model(model)
    with pytest.raises(
        ValueError, match=r"\(the model itself first\) since, for example with accelerator.unwrap_model"
    ):
        unpatch(model)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert model(tokens, labels=tokens).logits is None
    unpatch(model)


def test_weights_on_the_meta_device_are_no_hindrance_but_for_the_loss():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(build("llama").config)
    report = patch(model)
    assert [row.why for row in report.left] == ["has weights on the meta device"]


def test_importing_the_kernels_does_not_import_transformers():
    code = """
import sys, tilewright.kernels
assert "transformers" not in sys.modules
sys.modules["transformers"] = None  # as if it were not installed
try:
    tilewright.kernels.patch
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    assert output.strip() == "tilewright.kernels.patch needs transformers: pip install 'tilewright[transformers]'"


def test_a_classifier_is_patched_below_its_head(tokens):
    model = transformers.AutoModelForSequenceClassification.from_config(build("llama").config)
    assert isinstance(model, PreTrainedModel)
    expected = model(tokens).logits
    report = patch(model)
    assert not report.left
    torch.testing.assert_close(model(tokens).logits, expected)
