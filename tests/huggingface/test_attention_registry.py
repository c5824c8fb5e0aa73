"""``attn_implementation="tilewright"``: served by our attention where it has a word for the mask, right everywhere."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask

from tilewright.kernels import register_attention
from tilewright.kernels.huggingface.attention_registry import attention_forward
from tilewright.kernels.huggingface.masks import RuleMask

from .conftest import build

register_attention()


def switched(family, **changes):
    """The model in PyTorch's attention (eager, where that takes no softcap) and in ours."""
    theirs = build(family, **changes)
    ours = build(family, **changes)
    ours.set_attn_implementation("tilewright")
    return theirs, ours


def test_a_model_is_built_with_it(tokens, tmp_path):
    theirs = build("llama").eval()
    ours = transformers.AutoModelForCausalLM.from_config(theirs.config, attn_implementation="tilewright").eval()
    assert ours.config._attn_implementation == "tilewright"
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("sdpa")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tilewright").eval()
    torch.testing.assert_close(loaded(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", [{}, {}]),
        ("mistral", [{"window": 5}, {"window": 5}]),
        ("qwen2", [{}, {"window": 5}]),
        ("qwen2_moe", [{"window": 5}, {}]),  # whose layers do not say their window themselves
        ("gemma2", [{"window": 5, "softcap": 50.0}, {"softcap": 50.0}]),
        ("gpt_oss", [{"window": 5, "sinks": True}, {"sinks": True}]),
        ("bert", [{"causal": False}, {"causal": False}]),
    ],
)
def test_each_layer_is_served_with_its_own_options(family, options, tokens, served, assert_agree):
    theirs, ours = switched(family)
    assert_agree(theirs, ours, input_ids=tokens)
    plain = [{name: name == "sinks" or option for name, option in call.items() if name != "scale"} for call in served]
    assert plain == [{"causal": True} | layer for layer in options]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_documents_do_not_see_each_other(family, tokens, served, assert_agree):
    theirs, ours = switched(family)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    options = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    assert_agree(theirs, ours, **options)
    assert [call["cu_seqlens"].tolist() for call in served] == [[0, 4, 11, 13, 22]] * 2
    assert {call["max_seqlen"] for call in served} == {9}
    alone = ours(tokens[:1, 4:]).logits
    torch.testing.assert_close(ours(**options).logits[:1, 4:], alone)


def test_lengths_of_packed_documents_are_taken_from_the_arguments_of_flash_attention(tokens, served):
    _, ours = switched("llama")
    documents = {
        "cu_seq_lens_q": torch.tensor([0, 4, 11], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 4, 11], dtype=torch.int32),
        "max_length_q": 7,
        "max_length_k": 7,
    }
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    logits = ours(tokens[:1], position_ids=positions, use_cache=False, **documents).logits
    torch.testing.assert_close(logits[:, 4:], ours(tokens[:1, 4:]).logits)
    # With no restart in the positions to tell the documents by:
    _, ours = switched("gpt2")
    served.clear()
    with torch.no_grad():
        ours.transformer.wpe.weight.zero_()
    logits = ours(tokens[:1], use_cache=False, **documents).logits
    torch.testing.assert_close(logits[:, 4:], ours(tokens[:1, 4:]).logits)
    assert served[0]["cu_seqlens"].tolist() == [0, 4, 11]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_tokens_that_come_with_a_cache_in_pieces_see_all_before_them(family, tokens, served):
    theirs, ours = (model.eval() for model in switched(family))
    whole = theirs(tokens).logits
    cache = transformers.DynamicCache(config=ours.config)
    pieces = [ours(piece, past_key_values=cache).logits for piece in tokens.split([4, 3, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert len(served) == 4 * 2


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_masked_by_pytorch(padding, tokens, served, assert_agree):
    theirs, ours = switched("llama")
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 4) if padding == "left" else slice(7, None)] = 0
    assert_agree(theirs, ours, input_ids=tokens, attention_mask=mask)
    assert not served


def test_a_mask_of_ones_is_no_mask(tokens, served, assert_agree):
    theirs, ours = switched("llama")
    assert_agree(theirs, ours, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert len(served) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_custom_mask_is_kept_to(family, tokens, served, assert_agree):
    theirs, ours = switched(family)
    generator = torch.Generator().manual_seed(2)
    seen = (torch.rand(2, 1, 11, 11, generator=generator) < 0.5) | torch.eye(11, dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    masks = {"full_attention": bias, "sliding_attention": bias} if family == "gemma2" else bias
    assert_agree(theirs, ours, input_ids=tokens, attention_mask=masks)
    assert not served


def test_dropout_is_done_by_pytorch(tokens, served):
    theirs, ours = (model.train() for model in switched("llama", attention_dropout=0.5))
    torch.manual_seed(3)
    expected = theirs(tokens).logits
    torch.manual_seed(3)
    torch.testing.assert_close(ours(tokens).logits, expected)
    assert not served
    ours.eval()(tokens)
    assert served


def test_attention_probabilities_are_given_to_who_asks(tokens):
    theirs, ours = (model.eval() for model in switched("gpt_oss"))
    assert theirs.config._attn_implementation == "eager"
    expected, output = (model(tokens, output_attentions=True) for model in (theirs, ours))
    torch.testing.assert_close(output.logits, expected.logits)
    for weights, reference in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, reference)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_attention_probabilities_are_given_where_layers_do_not_hand_on_that_they_are_asked_for(family, tokens):
    theirs, ours = (model.eval() for model in switched(family))
    theirs.set_attn_implementation("eager")
    arguments = {"input_ids": tokens, "output_attentions": True}
    arguments |= {"decoder_input_ids": tokens[:, :7]} if family == "t5" else {}
    expected, output = (model(**arguments) for model in (theirs, ours))
    torch.testing.assert_close(output.logits, expected.logits)
    for name in (
        ("attentions",) if family == "opt" else ("encoder_attentions", "decoder_attentions", "cross_attentions")
    ):
        assert len(output[name]) == 2
        for weights, reference in zip(output[name], expected[name], strict=True):
            torch.testing.assert_close(weights, reference)


def test_attention_probabilities_come_after_dropout_as_in_eager_attention(tokens):
    theirs, ours = (model.train() for model in switched("llama", attention_dropout=0.5))
    theirs.set_attn_implementation("eager")
    weights = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        weights.append(model(tokens, output_attentions=True).attentions[0])
    torch.testing.assert_close(weights[1], weights[0])


def test_under_autocast_the_kernels_serve(tokens, served):
    """Rotation leaves queries and keys in float32 beside bfloat16 values there."""
    theirs, ours = switched("llama")
    exact = theirs(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error_of_theirs, error = ((model(tokens).logits - exact).abs().max() for model in (theirs, ours))
    assert error < 2 * error_of_theirs
    assert len(served) == 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("through", ["softcap", "dropout", "head_dim"])
def test_what_is_not_served_keeps_to_the_same_rule(causal, queries, window, through, served):
    """The last query stands at the last key, whether our attention or PyTorch's computes it."""
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, 7, 8, generator=generator) for _ in range(2))
    layer = SimpleNamespace(is_causal=causal, num_key_value_groups=2)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": 2.0 if through == "softcap" else None}
    expected, weights = attention_forward(layer, q, k, v, None, **options)
    assert len(served) == 1
    assert weights is None
    match through:
        case "softcap":
            got, _ = attention_forward(layer, q, k, v, None, output_attentions=True, **options)
        case "dropout":
            got, _ = attention_forward(layer, q, k, v, None, dropout=1e-12, **options)
        case "head_dim":
            pad = torch.nn.functional.pad
            got, _ = attention_forward(layer, pad(q, (0, 300)), pad(k, (0, 300)), pad(v, (0, 300)), None, **options)
            got = got[..., :8]
    assert len(served) == 1
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_the_rule_of_a_mask_says_what_the_matrix_says(packed, window):
    """`attention` by the rule against PyTorch by the matrix, which transformers itself computes."""
    config = build("mistral", sliding_window=window).config
    config._attn_implementation = "tilewright"
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]] if packed else [list(range(11))])
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = make(config, torch.zeros(2, 11, 32), None, None, positions)
    if not packed and window is None:
        assert mask is None
        return
    assert isinstance(mask, RuleMask)
    assert mask.shape == (2, 1, 11, 11)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 4, 11, 8, generator=generator) for _ in range(3))
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.matrix()).transpose(1, 2)
    torch.testing.assert_close(attention_forward(layer, q, k, v, mask)[0], expected)
    config._attn_implementation = "sdpa"
    assert torch.equal(mask & True, make(config, torch.zeros(2, 11, 32), None, None, positions))


def test_a_mask_that_is_cut_or_added_becomes_the_matrix():
    config = build("mistral").config
    config._attn_implementation = "tilewright"
    mask = create_sliding_window_causal_mask(config, torch.zeros(2, 11, 32), None, None)
    assert isinstance(mask, RuleMask)
    cut = mask[:, :, 3:, :7]
    assert not isinstance(cut, RuleMask)
    assert torch.equal(cut, mask.matrix()[:, :, 3:, :7])
    bias = torch.where(mask, 0.0, -1.0)
    assert bias.sum() == -float((~mask.matrix()).sum())


def test_chunks_and_overlays_are_matrices():
    config = build("mistral").config
    config._attn_implementation = "tilewright"
    config.attention_chunk_size = 4
    embeddings = torch.zeros(2, 11, 32)
    chunked = create_chunked_causal_mask(config, embeddings, None, None)
    overlaid = create_causal_mask(config, embeddings, None, None, or_mask_function=lambda b, h, q, k: k == 10)
    for mask in (chunked, overlaid):
        assert type(mask) is torch.Tensor
        assert mask.shape == (2, 1, 11, 11)
    assert not chunked[0, 0, 5, 3]
    assert overlaid[0, 0, 0, 10]
