"""What no op can take is refused by a ``ValueError`` that names the op and the argument, on either path: what is no
tensor, what is no number, and numbers that are infinite or NaN."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from tilewright.kernels import (
    AdamW,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    adamw,
    attention,
    choose,
    clip_coefficient,
    cross_entropy,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    nn,
    qk_norm_rotary,
    rms_norm,
    rotary_tables,
    use,
)
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS

NO_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "list": lambda x: x.tolist(),
    "ndarray": lambda x: x.numpy(),
    "float": lambda x: 1.5,
    "None": lambda x: None,
}
NO_NUMBERS = [None, "1", [1.0], 1j, True, numpy.float32(0.5), torch.tensor(1.0), 10**30, math.nan, math.inf]


@pytest.fixture(params=["triton", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use(request.param):
        yield


def fullest(spec: OpSpec) -> Sample:
    """The small sample with the most tensors."""
    samples = [s for s in spec.samples(torch.device("cpu"), torch.float32) if s.tensors.keys()]
    return max(samples, key=lambda s: (len(s.tensors), -sum(x.numel() for x in s.tensors.values())))


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_is_no_tensor_is_refused_by_name(spec: OpSpec, kind: str) -> None:
    sample, parameters = fullest(spec), inspect.signature(spec.function).parameters
    for name, x in sample.tensors.items():
        given = NO_TENSORS[kind](x)
        if (given is None and parameters[name].default is None) or (name == "clip" and isinstance(given, float)):
            continue
        with pytest.raises(ValueError, match=rf"^{spec.name}: {name} is "):
            spec.function(**{**sample.tensors, name: given}, **sample.options)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_sparse_tensor_is_refused_by_name(spec: OpSpec) -> None:
    sample = fullest(spec)
    for name in sample.tensors.keys() - {"clip"}:
        with pytest.raises(ValueError, match=rf"^{spec.name}: {name} has layout torch.sparse_coo; it must be dense"):
            spec.function(**{**sample.tensors, name: sample.tensors[name].to_sparse()}, **sample.options)


X, W, LABELS = torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64)
TABLE = torch.ones(3, 4)


Q = torch.ones(4, 2, 8)
STARTS = torch.tensor([0, 4], dtype=torch.int32)

OPTIONS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("attention", "scale", lambda v: attention(Q[None], Q[None], Q[None], scale=v)),
    ("attention", "window", lambda v: attention(Q[None], Q[None], Q[None], window=v)),
    ("attention", "softcap", lambda v: attention(Q[None], Q[None], Q[None], softcap=v)),
    ("attention", "max_seqlen", lambda v: attention(Q, Q, Q, cu_seqlens=STARTS, max_seqlen=v)),
    ("rms_norm", "eps", lambda v: rms_norm(X, eps=v)),
    ("rms_norm", "weight_offset", lambda v: rms_norm(X, X[0], weight_offset=v)),
    ("qk_norm_rotary", "eps", lambda v: qk_norm_rotary(X[None], X[None], X[0], X[0], TABLE, TABLE, eps=v)),
    (
        "qk_norm_rotary",
        "weight_offset",
        lambda v: qk_norm_rotary(X[None], X[None], X[0], X[0], TABLE, TABLE, weight_offset=v),
    ),
    ("cross_entropy", "label_smoothing", lambda v: cross_entropy(X, LABELS, label_smoothing=v)),
    ("cross_entropy", "z_loss", lambda v: cross_entropy(X, LABELS, z_loss=v)),
    ("cross_entropy", "softcap", lambda v: cross_entropy(X, LABELS, softcap=v)),
    ("cross_entropy", "ignore_index", lambda v: cross_entropy(X, LABELS, ignore_index=v)),
    ("linear_cross_entropy", "softcap", lambda v: linear_cross_entropy(X, W, LABELS, softcap=v)),
    ("linear_logprob", "softcap", lambda v: linear_logprob(X, W, LABELS, softcap=v)),
    ("linear_kl", "temperature", lambda v: linear_kl(X, W, X, W, temperature=v)),
    ("adamw", "step", lambda v: adamw(X, X, X, X, step=v)),
    ("adamw", "lr", lambda v: adamw(X, X, X, X, step=1, lr=v)),
    ("adamw", "betas", lambda v: adamw(X, X, X, X, step=1, betas=(0.9, v))),
    ("adamw", "betas", lambda v: adamw(X, X, X, X, step=1, betas=v)),
    ("adamw", "seed", lambda v: adamw(X, X, X, X, step=1, seed=v)),
    ("adamw", "clip", lambda v: adamw(X, X, X, X, step=1, clip=v)),
    ("AdamW", "lr", lambda v: AdamW([X.clone()], lr=v)),
    ("AdamW", "clip", lambda v: stepped(v)),
    ("clip_coefficient", "max_norm", lambda v: clip_coefficient([], v)),
    ("rotary_tables", "max_positions", lambda v: rotary_tables(v, 8)),
    ("rotary_tables", "rotary_dim", lambda v: rotary_tables(3, v)),
    ("rotary_tables", "base", lambda v: rotary_tables(3, 8, base=v)),
    ("LinearScaling", "factor", lambda v: LinearScaling(factor=v)),
    ("YarnScaling", "original_max_positions", lambda v: YarnScaling(factor=2.0, original_max_positions=v)),
    ("YarnScaling", "mscale", lambda v: YarnScaling(factor=2.0, original_max_positions=4, mscale=v)),
    ("Llama3Scaling", "high_freq_factor", lambda v: Llama3Scaling(factor=2.0, high_freq_factor=v)),
    ("RMSNorm", "weight_offset", lambda v: nn.RMSNorm(8, weight_offset=v)),
    ("SwiGLU", "hidden_features", lambda v: nn.SwiGLU(8, v)),
    ("Attention", "num_heads", lambda v: nn.Attention(8, v)),
    ("LinearCrossEntropyLoss", "num_classes", lambda v: nn.LinearCrossEntropyLoss(8, v)),
]
MAY_BE_NONE = {"scale", "window", "max_seqlen", "softcap", "clip", "mscale"}
# A tensor may hold the learning rate or the clip; no norm is too large to be left alone.
ALLOWED_ELSEWHERE = {("AdamW", "lr"), ("AdamW", "clip"), ("adamw", "clip"), ("clip_coefficient", "max_norm")}


def stepped(clip: Any) -> None:
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = X.clone()
    AdamW([parameter]).step(clip=clip)


@pytest.mark.parametrize(("op", "name", "call"), OPTIONS, ids=[f"{op}-{name}" for op, name, _ in OPTIONS])
def test_what_is_no_finite_number_is_refused_by_name(op: str, name: str, call: Callable[[Any], Any]) -> None:
    for value in NO_NUMBERS:
        if value is None and name in MAY_BE_NONE:
            continue
        if (op, name) in ALLOWED_ELSEWHERE and (isinstance(value, torch.Tensor) or value == math.inf):
            continue
        with pytest.raises(ValueError, match=re.escape(f"{op}: {name} is ")):
            call(value)


def test_a_position_outside_the_tables_is_refused_by_the_op_that_was_called() -> None:
    with use("reference"), pytest.raises(ValueError, match=r"^qk_norm_rotary: positions holds a position outside"):
        qk_norm_rotary(X[None], X[None], X[0], X[0], TABLE, TABLE, positions=torch.full((1,), 9))


def test_on_the_meta_device_shapes_are_computed_whatever_is_demanded() -> None:
    x = torch.ones(3, 8, device="meta")
    assert choose(x.device, x.dtype).implementation == "reference"
    for y in (rms_norm(x), nn.SwiGLU(8, 4, device="meta")(x), nn.Attention(8, 2, device="meta")(x)[0]):
        assert isinstance(y, torch.Tensor)
        assert y.shape == (3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_logprob(x, W.to("meta"), LABELS.to("meta")).shape == (3,)


def test_a_device_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^choose: device is 'cpu'; it must be a torch.device"):
        choose("cpu", torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module", [nn.RMSNorm(8), nn.LayerNorm(8), nn.SwiGLU(8, 4), nn.GEGLU(8, 4), nn.Attention(8, 2)]
)
@pytest.mark.parametrize("value", [None, [1.0], X.numpy(), X.long(), X.to_sparse()], ids=lambda v: type(v).__name__)
def test_a_module_names_the_input_that_it_cannot_take(module: torch.nn.Module, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{type(module).__name__}: (x|input|query) (is of type|has)"):
        module(value)


@pytest.mark.parametrize("value", [X.double(), X.half(), X.to("meta")], ids=["float64", "float16", "meta"])
def test_attention_names_the_input_that_its_weights_do_not_fit(value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^Attention: query (has dtype|is on)"):
        nn.Attention(8, 2)(value)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.LinearCrossEntropyLoss(8, 5)], ids=["rows", "head"])
def test_a_loss_names_the_target_that_is_no_tensor(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"^{type(loss).__name__}: target is of type list; it must be a tensor"):
        loss(X, [0, 1, 2])


def test_a_negative_norm_to_clip_to_is_refused_rather_than_turning_the_step_around() -> None:
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = X.clone()
    with pytest.raises(ValueError, match=r"^clip_coefficient: max_norm is -1\.0; it must be a number, at least 0"):
        clip_coefficient([parameter], -1.0)
    assert clip_coefficient([parameter], math.inf)[0] == 1.0


def test_one_parameter_alone_is_clipped_as_a_list_of_it_is() -> None:
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = X.clone()
    alone, listed = clip_coefficient(parameter, 1.0), clip_coefficient([parameter], 1.0)
    assert alone == listed
    assert alone[0] < 1.0


def test_no_gradient_flows_through_the_clip_of_a_step() -> None:
    clip = torch.tensor(0.5, requires_grad=True)
    assert not any(x.requires_grad for x in adamw(X, X, X, X, step=1, clip=clip))


def test_logits_whose_square_is_infinite_have_a_loss_where_there_is_no_z_loss() -> None:
    bias = torch.full((5,), 3e38)
    loss = linear_cross_entropy(0.0 * X, W, LABELS, bias=bias)
    assert isinstance(loss, torch.Tensor)
    torch.testing.assert_close(loss, torch.tensor(math.log(5)))


@pytest.mark.parametrize("softcap", [1e4, 1e8, 1e15])
def test_a_softcap_far_above_the_logits_leaves_them_alone(softcap: float) -> None:
    logits, targets = torch.randn(4, 100, requires_grad=True), torch.arange(4)
    capped, free = (cross_entropy(logits, targets, softcap=cap) for cap in (softcap, None))
    assert isinstance(capped, torch.Tensor)
    assert isinstance(free, torch.Tensor)
    torch.testing.assert_close(capped, free, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (capped, free)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_a_clip_of_many_dimensions_is_one_number() -> None:
    param = adamw(X, X, X, X, step=1, clip=torch.full((1, 1, 1), 0.5))[0]
    torch.testing.assert_close(param, adamw(X, X, X, X, step=1, clip=0.5)[0])
