"""The modules of tilewright.kernels.nn stand in for those of torch.nn: same arguments, state dicts, initial values,
outputs and gradients; what they cannot do they refuse by name."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tilewright.kernels
from tilewright.kernels import attention, nn, rotary_tables
from tilewright.kernels.dispatch import use

COUNTERPARTS = {
    nn.RMSNorm: torch.nn.RMSNorm,
    nn.LayerNorm: torch.nn.LayerNorm,
    nn.CrossEntropyLoss: torch.nn.CrossEntropyLoss,
    nn.LinearCrossEntropyLoss: torch.nn.LinearCrossEntropyLoss,
    nn.Attention: torch.nn.MultiheadAttention,
}


@pytest.fixture(params=["triton", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def pair(module: type, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One of ours and its counterpart, with the same random parameters: each loads the other's state dict."""
    ours, theirs = module(*args, **options), COUNTERPARTS[module](*args, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_agree(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    call: Callable[[torch.nn.Module, list[torch.Tensor]], torch.Tensor],
    *inputs: torch.Tensor,
) -> None:
    """Outputs and the gradients of inputs and parameters are the same."""
    results = []
    for module in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        parameters = dict(module.named_parameters())
        y = call(module, leaves)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, [*leaves, *parameters.values()], upstream)
        names = [*(f"input {number}" for number in range(len(leaves))), *parameters]
        results.append((y.detach(), dict(zip(names, gradients, strict=True))))
    (our_y, our_gradients), (their_y, their_gradients) = results
    torch.testing.assert_close(our_y, their_y, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


NORMS = [
    (nn.RMSNorm, {"normalized_shape": 48}),
    (nn.RMSNorm, {"normalized_shape": [3, 16], "eps": 0.1}),
    (nn.RMSNorm, {"normalized_shape": torch.Size((5, 3, 16))}),
    (nn.RMSNorm, {"normalized_shape": 48, "elementwise_affine": False}),
    (nn.LayerNorm, {"normalized_shape": 48}),
    (nn.LayerNorm, {"normalized_shape": (3, 16), "eps": 0.1}),
    (nn.LayerNorm, {"normalized_shape": 48, "bias": False}),
    (nn.LayerNorm, {"normalized_shape": [3, 16], "elementwise_affine": False}),
]


def norm_input(options: dict[str, Any]) -> torch.Tensor:
    return torch.randn(2, 5, 48) if options["normalized_shape"] == 48 else torch.randn(2, 5, 3, 16)


@pytest.mark.parametrize(("module", "options"), NORMS, ids=str)
def test_norms_are_those_of_torch(module: type, options: dict[str, Any]) -> None:
    assert_agree(*pair(module, **options), lambda norm, inputs: norm(*inputs), norm_input(options))


@pytest.mark.parametrize(("module", "options"), NORMS, ids=str)
def test_norms_return_the_sum_with_a_residual_and_its_normalisation(module: type, options: dict[str, Any]) -> None:
    norm, _ = pair(module, **options)
    x, residual = norm_input(options), norm_input(options)
    y, summed = norm(x, residual)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(y, norm(x + residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_without_eps_takes_the_one_that_torch_takes(dtype: torch.dtype, implementation: str) -> None:
    if implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where a GPU rounds")
    x = torch.full((1, 8), 3e-4, dtype=dtype)  # x² is about the machine epsilon of float32
    ours, theirs = nn.RMSNorm(8, dtype=dtype)(x), torch.nn.RMSNorm(8, dtype=dtype)(x)
    assert ours[0, 0] < 0.7  # without eps it would be 1, with the epsilon of a 16-bit dtype below 0.02
    torch.testing.assert_close(ours, theirs)


def test_rms_norm_in_float64_takes_the_epsilon_of_float64() -> None:
    x = torch.full((1, 8), 1e-8, dtype=torch.float64)
    with use("reference"):
        torch.testing.assert_close(nn.RMSNorm(8, dtype=torch.float64)(x), F.rms_norm(x, (8,)))


def test_rms_norm_with_an_offset_starts_as_one_without() -> None:
    x = torch.randn(3, 8)
    gemma = nn.RMSNorm(8, weight_offset=1.0)
    assert torch.equal(gemma.weight, torch.zeros(8))
    torch.testing.assert_close(gemma(x), torch.nn.RMSNorm(8)(x))
    with torch.no_grad():
        gemma.weight.fill_(0.5)
    torch.testing.assert_close(gemma(x), 1.5 * torch.nn.RMSNorm(8)(x))


LOSSES = [
    {},
    {"reduction": "sum", "ignore_index": 3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "ignore_index": 0},
]


@pytest.mark.parametrize("shape", [(10,), (6, 10), (2, 10, 3), (2, 10, 3, 2)], ids=str)
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_cross_entropy_loss_is_that_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    classes_first = shape if len(shape) > 1 else (1, *shape)
    targets = torch.randint(0, 10, (classes_first[0], *classes_first[2:]))
    targets[0] = 7  # not all may be ignored
    targets = targets if len(shape) > 1 else targets[0]
    assert_agree(*pair(nn.CrossEntropyLoss, **options), lambda loss, inputs: loss(*inputs, targets), torch.randn(shape))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_linear_cross_entropy_loss_is_that_of_torch(bias: bool, options: dict[str, Any]) -> None:
    targets = torch.tensor([7, 3, 0, 9, 9, 1])
    ours, theirs = pair(nn.LinearCrossEntropyLoss, 8, 10, bias=bias, **options)
    assert list(ours.state_dict()) == ["linear.weight", "linear.bias"][: 1 + bias]
    assert_agree(ours, theirs, lambda loss, inputs: loss(*inputs, targets), torch.randn(6, 8))


def test_linear_cross_entropy_loss_takes_any_number_of_leading_dimensions() -> None:
    loss = nn.LinearCrossEntropyLoss(8, 10)
    hidden, targets = torch.randn(2, 3, 8), torch.randint(0, 10, (2, 3))
    torch.testing.assert_close(loss(hidden, targets), loss(hidden.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("linear", [False, True])
def test_the_losses_take_what_the_ops_add(linear: bool) -> None:
    x, targets = 3 * torch.randn(6, 8), torch.tensor([7, 3, 0, 5, 5, 1])
    extra = {"z_loss": 0.1, "softcap": 2.0, "return_z_loss": True}
    loss = nn.LinearCrossEntropyLoss(8, 8, **extra) if linear else nn.CrossEntropyLoss(**extra)
    total, z_loss = loss(x, targets)
    logits = 2.0 * torch.tanh((loss.linear(x) if linear else x) / 2.0)
    expected = 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(z_loss, expected)
    torch.testing.assert_close(total, F.cross_entropy(logits, targets) + expected)


def test_a_tied_head_takes_its_gradient_from_both_uses() -> None:
    embedding, loss = torch.nn.Embedding(10, 8), nn.LinearCrossEntropyLoss(8, 10)
    loss.linear.weight = embedding.weight
    tokens = torch.randint(0, 10, (6,))
    (got,) = torch.autograd.grad(loss(embedding(tokens), tokens), embedding.weight)
    weight = embedding.weight
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(weight[tokens], weight), tokens), weight)
    torch.testing.assert_close(got, expected)


ATTENTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 24, "vdim": 40},
    {"kdim": 24, "vdim": 40, "bias": False, "batch_first": True},
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_attention_is_torchs_multi_head_attention(options: dict[str, Any], batched: bool) -> None:
    ours, theirs = pair(nn.Attention, 32, 2, **options)
    kdim, vdim, batch_first = options.get("kdim", 32), options.get("vdim", 32), options.get("batch_first")
    inputs = [torch.randn(2, seq, width) for seq, width in ((5, 32), (7, kdim), (7, vdim))]
    query, key, value = (x[0] if not batched else x if batch_first else x.transpose(0, 1) for x in inputs)
    assert_agree(ours, theirs, lambda module, inputs: module(*inputs, need_weights=False)[0], query, key, value)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_to_itself_may_be_causal(batch_first: bool) -> None:
    ours, theirs = pair(nn.Attention, 32, 2, batch_first=batch_first)
    x = torch.randn(5, 5, 32)  # as many sequences as tokens: the right one must be the sequence
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)

    def call(module: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        return module(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0]

    assert_agree(ours, theirs, call, x)
    shorthand, weights = ours(x, is_causal=True)
    torch.testing.assert_close(shorthand, call(ours, [x]))
    assert weights is None


def test_attention_with_fewer_kv_heads_is_attention_with_them_repeated() -> None:
    grouped = nn.Attention(32, 4, kv_heads=2)
    full = torch.nn.MultiheadAttention(32, 4)
    assert grouped.in_proj_weight.shape == (32 + 2 * 16, 32)
    with torch.no_grad():
        grouped.in_proj_bias.normal_()
        for name in ("in_proj_weight", "in_proj_bias"):
            q, k, v = getattr(grouped, name).split([32, 16, 16])
            repeated = [x.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v)]
            getattr(full, name).copy_(torch.cat([q, *repeated]))
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(grouped(x)[0], full(x, x, x)[0])


def test_attention_turns_q_and_k_by_their_positions() -> None:
    module = nn.Attention(32, 2, batch_first=True)
    x, tables = torch.randn(2, 5, 32), rotary_tables(50, 16)
    counted = module(x, is_causal=True, rotary_tables=tables)[0]
    assert not torch.allclose(counted, module(x, is_causal=True)[0], atol=1e-2)
    # Distances alone matter, and each sequence has its own positions.
    positions = torch.arange(5) + torch.tensor([[0], [40]])
    moved = module(x, is_causal=True, rotary_tables=tables, positions=positions)[0]
    torch.testing.assert_close(moved, counted, rtol=1e-4, atol=1e-5)
    alone = module(x[1], is_causal=True, rotary_tables=tables, positions=positions[1])[0]
    torch.testing.assert_close(alone, counted[1], rtol=1e-4, atol=1e-5)
    spread = module(x, is_causal=True, rotary_tables=tables, positions=2 * torch.arange(5).expand(2, 5))[0]
    assert not torch.allclose(spread, counted, atol=1e-2)


def test_attention_keeps_packed_documents_apart() -> None:
    module = nn.Attention(32, 4, kv_heads=2)
    first, second = torch.randn(3, 32), torch.randn(4, 32)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = module(torch.cat([first, second]), is_causal=True, cu_seqlens=starts, max_seqlen=4)[0]
    apart = [module(document, is_causal=True)[0] for document in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_attention_hands_its_options_to_the_op() -> None:
    options = {"scale": 0.7, "window": 2, "softcap": 1.5}
    module = nn.Attention(32, 2, batch_first=True, sinks=True, **options)
    assert "sinks" in module.state_dict()
    with torch.no_grad():
        module.sinks.copy_(torch.tensor([0.5, -0.5]))
    x = torch.randn(2, 5, 32)
    parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (2, 16)) for part in parts)
    expected = attention(q, k, v, causal=True, sinks=module.sinks, **options)
    y = module(x, is_causal=True)[0]
    torch.testing.assert_close(y, module.out_proj(expected.flatten(-2)))
    assert torch.autograd.grad(y.square().sum(), module.sinks)[0].abs().min() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (nn.SwiGLU, F.silu),
        (nn.GEGLU, F.gelu),
        (lambda *a, **o: nn.GEGLU(*a, approximate="tanh", **o), lambda x: F.gelu(x, approximate="tanh")),
    ],
    ids=["SwiGLU", "GEGLU", "GEGLU tanh"],
)
def test_gated_layers_are_their_formula(module: Callable[..., Any], activation: Any, bias: bool) -> None:
    layer = module(6, 20, 4, bias=bias)
    keys = [f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")[: 1 + bias]]
    assert list(layer.state_dict()) == keys

    def formula(layer: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        return layer.down_proj(activation(layer.gate_proj(x)) * layer.up_proj(x))

    x = torch.randn(2, 3, 6)
    y = layer(x)
    assert y.shape == (2, 3, 4)
    expected = formula(layer, [x])
    torch.testing.assert_close(y, expected)
    parameters = list(layer.parameters())
    for got, wanted in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_gated_layers_give_back_the_width_they_take_unless_told_otherwise() -> None:
    assert nn.SwiGLU(6, 20)(torch.randn(6)).shape == (6,)


@pytest.mark.parametrize(("ours", "theirs"), COUNTERPARTS.items(), ids=lambda module: module.__name__)
def test_constructors_take_the_arguments_of_their_counterparts_and_more_by_keyword(ours: type, theirs: type) -> None:
    expected, got = (inspect.signature(module.__init__).parameters for module in (theirs, ours))
    for number, (name, parameter) in enumerate(expected.items()):
        assert list(got)[number] == name or parameter.kind == parameter.KEYWORD_ONLY
        assert (got[name].default, got[name].kind) == (parameter.default, parameter.kind)
    assert all(got[name].kind == inspect.Parameter.KEYWORD_ONLY for name in got.keys() - expected.keys())


MODULES = {
    "RMSNorm": lambda **o: nn.RMSNorm(8, 1e-3, weight_offset=1.0, **o),
    "LayerNorm": lambda **o: nn.LayerNorm((2, 4), **o),
    "CrossEntropyLoss": lambda **o: nn.CrossEntropyLoss(z_loss=0.1),
    "LinearCrossEntropyLoss": lambda **o: nn.LinearCrossEntropyLoss(8, 10, softcap=30.0, **o),
    "SwiGLU": lambda **o: nn.SwiGLU(8, 12, **o),
    "GEGLU": lambda **o: nn.GEGLU(8, 12, approximate="tanh", **o),
    "Attention": lambda **o: nn.Attention(8, 2, kv_heads=1, window=3, batch_first=True, sinks=True, **o),
}
REPRESENTED = {
    "RMSNorm": "(8,), eps=0.001, elementwise_affine=True, weight_offset=1.0",
    "LayerNorm": "(2, 4), eps=1e-05, elementwise_affine=True, bias=True",
    "CrossEntropyLoss": "reduction='mean', ignore_index=-100, label_smoothing=0.0, z_loss=0.1",
    "LinearCrossEntropyLoss": "in_features=8, num_classes=10, bias=False, reduction='mean'",
    "GEGLU": "approximate='tanh'",
    "Attention": "embed_dim=8, num_heads=2, kv_heads=1, window=3, batch_first=True, bias=True, sinks=True",
}
every_module = pytest.mark.parametrize("name", MODULES)


def result_of(module: torch.nn.Module) -> torch.Tensor:
    """What the module makes of a fixed input."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    if isinstance(module, torch.nn.CrossEntropyLoss):
        return module(x.flatten(0, 1), torch.arange(6))
    if isinstance(module, torch.nn.LinearCrossEntropyLoss):
        return module(x, torch.arange(6).view(2, 3))
    if isinstance(module, nn.LayerNorm):
        return module(x.unflatten(-1, (2, 4)))
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


@every_module
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    module = MODULES[name]()
    expected = result_of(module)
    assert torch.equal(result_of(copy.deepcopy(module)), expected)
    assert torch.equal(result_of(pickle.loads(pickle.dumps(module))), expected)


@every_module
def test_modules_compile_into_one_graph(name: str) -> None:
    module = MODULES[name]()
    expected = result_of(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    if isinstance(module, torch.nn.CrossEntropyLoss):
        got = compiled(x.flatten(0, 1), torch.arange(6))
    elif isinstance(module, torch.nn.LinearCrossEntropyLoss):
        got = compiled(x, torch.arange(6).view(2, 3))
    else:
        got = compiled(x.unflatten(-1, (2, 4)) if isinstance(module, nn.LayerNorm) else x)
    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, expected)


@every_module
def test_modules_born_on_meta_are_as_good_once_filled_and_reset(name: str) -> None:
    torch.manual_seed(3)
    expected = result_of(MODULES[name]())
    module = MODULES[name](device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(3)
    for part in [m for m in module.modules() if m is not module] + [module]:  # as constructors do: parts first
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert torch.equal(result_of(module), expected)


@every_module
def test_modules_take_a_dtype(name: str) -> None:
    assert all(parameter.dtype == torch.float16 for parameter in MODULES[name](dtype=torch.float16).parameters())


@pytest.mark.parametrize("name", REPRESENTED)
def test_modules_say_how_they_were_made(name: str) -> None:
    text = repr(MODULES[name]())
    assert text.startswith(f"{name}(")
    for part in re.findall(r"\(.*?\)|\w+=[^,]+", REPRESENTED[name]):
        assert part in text


@pytest.mark.parametrize(("ours", "theirs"), COUNTERPARTS.items(), ids=lambda module: module.__name__)
def test_the_same_seed_gives_the_initial_values_of_the_counterpart(ours: type, theirs: type) -> None:
    args = {"CrossEntropyLoss": (), "LinearCrossEntropyLoss": (8, 10), "Attention": (8, 2)}.get(ours.__name__, (8,))
    torch.manual_seed(0)
    expected = theirs(*args).state_dict()
    torch.manual_seed(0)
    got = ours(*args).state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_the_modules_are_reached_from_the_package() -> None:
    assert tilewright.kernels.nn is nn
    assert set(nn.__all__) == {module.__name__ for module in COUNTERPARTS} | {"SwiGLU", "GEGLU"}


X, TARGETS = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
SEQUENCES = torch.zeros(3, 2, 8)


def named(message: str, call: Callable[[], Any]) -> Any:
    return pytest.param(call, message, id=re.sub(r"[^a-zA-Z0-9]+", "_", message)[:70])


REFUSED = [
    named("RMSNorm: x has shape (2, 8); its last dimensions must be normalized_shape, (7,)", lambda: nn.RMSNorm(7)(X)),
    named("RMSNorm: x has shape (2, 8); its last", lambda: nn.RMSNorm((3, 8), elementwise_affine=False)(X)),
    named("of at least one dimension", lambda: nn.RMSNorm(())(X)),
    named("rms_norm: residual has shape", lambda: nn.RMSNorm(8)(X, X[:1])),
    named("LayerNorm: input has shape (2, 8); its last dimensions must be", lambda: nn.LayerNorm((2, 4))(X)),
    named("CrossEntropyLoss: weight is a tensor; it must be None", lambda: nn.CrossEntropyLoss(X[0])),
    named("CrossEntropyLoss: size_average is True; it must be None", lambda: nn.CrossEntropyLoss(None, True)),
    named("CrossEntropyLoss: reduce is False; it must be None", lambda: nn.CrossEntropyLoss(reduce=False)),
    named("CrossEntropyLoss: label_smoothing is 1.5; it must be", lambda: nn.CrossEntropyLoss(label_smoothing=1.5)),
    named("CrossEntropyLoss: reduction is 'max'; it must be one of", lambda: nn.CrossEntropyLoss(reduction="max")),
    named("CrossEntropyLoss: softcap is 0; it must be more than 0", lambda: nn.CrossEntropyLoss(softcap=0)),
    named("CrossEntropyLoss: target has dtype torch.float32; it must be", lambda: nn.CrossEntropyLoss()(X, X)),
    named("targets has shape (2,); it must be (2, 3)", lambda: nn.CrossEntropyLoss()(torch.zeros(2, 8, 3), TARGETS)),
    named("LinearCrossEntropyLoss: out_features is (4,)", lambda: nn.LinearCrossEntropyLoss(8, 9, out_features=(4,))),
    named("LinearCrossEntropyLoss: weight is a tensor", lambda: nn.LinearCrossEntropyLoss(8, 9, weight=X[0])),
    named(
        "LinearCrossEntropyLoss: options is",
        lambda: nn.LinearCrossEntropyLoss(8, 9, options=torch.nn.LinearCrossEntropyOptions()),
    ),
    named("LinearCrossEntropyLoss: z_loss is -1; it must be", lambda: nn.LinearCrossEntropyLoss(8, 9, z_loss=-1)),
    named("LinearCrossEntropyLoss: target has dtype", lambda: nn.LinearCrossEntropyLoss(8, 8)(X, X)),
    named("SwiGLU: hidden_features is 0; it must be at least 1", lambda: nn.SwiGLU(8, 0)),
    named("SwiGLU: x has shape (2, 8); its last dimension must be in_features, 6", lambda: nn.SwiGLU(6, 4)(X)),
    named("GEGLU: approximate is 'erf'; it must be 'none' or 'tanh'", lambda: nn.GEGLU(8, 4, approximate="erf")),
    named("Attention: dropout is 0.1; it must be 0.0", lambda: nn.Attention(8, 2, 0.1)),
    named("Attention: add_bias_kv is True; it must be False", lambda: nn.Attention(8, 2, add_bias_kv=True)),
    named("Attention: add_zero_attn is True; it must be False", lambda: nn.Attention(8, 2, add_zero_attn=True)),
    named("Attention: num_heads is 3; it must be a divisor of embed_dim, 8", lambda: nn.Attention(8, 3)),
    named("Attention: kv_heads is 3; it must be a divisor of num_heads, 4", lambda: nn.Attention(8, 4, kv_heads=3)),
    named(
        "Attention: key_padding_mask is a tensor; it must be None: pack the documents",
        lambda: nn.Attention(8, 2)(SEQUENCES, key_padding_mask=torch.zeros(2, 3)),
    ),
    named("Attention: need_weights is True", lambda: nn.Attention(8, 2)(SEQUENCES, need_weights=True)),
    named("Attention: attn_mask is a tensor", lambda: nn.Attention(8, 2)(SEQUENCES, attn_mask=torch.zeros(3, 3))),
    named("Attention: query has shape (3, 2, 8); its last dimension", lambda: nn.Attention(6, 2)(SEQUENCES)),
    named("Attention: key has shape (2, 8); its last dimension must be kdim, 6", lambda: nn.Attention(8, 2, kdim=6)(X)),
    named("Attention: key has shape (2, 8); it must be of 2 or 3", lambda: nn.Attention(8, 2)(SEQUENCES, X)),
    named("Attention: query has shape (8,); it must be of 2 or 3", lambda: nn.Attention(8, 2)(X[0])),
    named(
        "Attention: query has shape (3, 2, 8); it must be (total_tokens, width) with cu_seqlens",
        lambda: nn.Attention(8, 2)(SEQUENCES, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_the_modules_cannot_do_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
