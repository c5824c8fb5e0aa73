"""Parameter groups by rule, the kinds of optimizers, and state that goes from one implementation to another."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.model import Transformer, from_preset
from tilewright.trainer import TrainingError
from tilewright.trainer.checkpoints.checkpoint import training_state
from tilewright.trainer.optimization.optimizer import build_optimizer, parameter_groups, set_learning_rate
from tilewright.trainer.parallel.sharding import World, sharded_model, world
from tilewright.trainer.recipe import Optimizer, ParameterGroup
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.step import MicroBatch, train_step

CONFIG = from_preset(
    "gpt2", vocab_size=30, hidden_size=16, layers=2, heads=2, kv_heads=2, head_dim=8, intermediate_size=24,
    max_sequence_length=8, initial_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Iterator[World]:
    with world() as alone:
        yield alone


def sharded(processes: World) -> Transformer:
    return sharded_model(CONFIG, processes, compute_dtype=torch.float32, compile=False, seed=1)


def step(model: Transformer, optimizer: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> None:
    """A step by a gradient that the seed decides, times `scale`."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_().mul_(scale)  # type: ignore[attr-defined]
    optimizer.step()


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().full_tensor().clone() for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]


def options(**options: Any) -> dict[str, tuple[float, float]]:
    """Of each parameter by name: its learning rate's factor and its weight decay."""
    groups = parameter_groups(Transformer(CONFIG), Optimizer(learning_rate=1e-3, weight_decay=0.1, **options))
    return {
        name: (group["learning_rate_factor"], group["weight_decay"]) for group in groups for name, _ in group["params"]
    }


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_matrices_are_decayed_and_norms_biases_and_embeddings_are_not(kind: str) -> None:
    got = options(kind=kind)
    assert got.keys() == dict(Transformer(CONFIG).named_parameters()).keys()
    for name, (factor, weight_decay) in got.items():
        matrix = name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))
        assert (factor, weight_decay) == (1.0, 0.1 if matrix else 0.0), name


def test_the_first_rule_that_matches_holds_and_leaves_what_it_does_not_state() -> None:
    rules = [
        ParameterGroup(r"blocks\.1\.", learning_rate_factor=0.5),
        ParameterGroup("mlp", learning_rate_factor=2.0, weight_decay=0.3),
        ParameterGroup("^embedding", weight_decay=0.01),
    ]
    got = options(groups=rules)
    assert got["blocks.1.mlp.up.weight"] == (0.5, 0.1)
    assert got["blocks.1.mlp.up.bias"] == (0.5, 0.0)
    assert got["blocks.0.mlp.up.weight"] == got["blocks.0.mlp.up.bias"] == (2.0, 0.3)
    assert got["embedding.weight"] == (1.0, 0.01)
    assert got["position_embedding.weight"] == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_a_factor_of_zero_holds_parameters_where_they_are_and_half_moves_them_half_as_far(
    processes: World, kind: str
) -> None:
    moved = {}
    for factors in ((1.0, 1.0), (0.0, 0.5)):
        model = sharded(processes)
        groups = [ParameterGroup(match, factor, 0.0) for match, factor in zip(("up", "down"), factors, strict=True)]
        recipe = Optimizer(learning_rate=7.0, kind=kind, groups=groups, orthogonalisation_dtype="float32")  # type: ignore[arg-type]
        optimizer = build_optimizer(model, recipe)
        set_learning_rate(optimizer, 1e-2)
        before = weights(model)
        step(model, optimizer, seed=0)
        moved[factors] = {name: weight - before[name] for name, weight in weights(model).items()}
    for name, whole in moved[1.0, 1.0].items():
        factor = 0.0 if "mlp.up" in name else 0.5 if "mlp.down" in name else 1.0
        assert 0 < whole.abs().max() < 1, name
        torch.testing.assert_close(moved[0.0, 0.5][name], factor * whole, rtol=1e-4, atol=1e-6)


def test_a_rule_that_holds_for_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(
        TrainingError,
        match=r"optimizer.groups\[0\].match is 'mlp.dwn.weight', .* nearest are blocks.\d.mlp.down.weight",
    ):
        options(groups=[ParameterGroup("mlp.dwn.weight")])
    with pytest.raises(TrainingError, match=r"groups\[1\].match is 'down'; every .* is taken by an earlier rule"):
        options(groups=[ParameterGroup("mlp"), ParameterGroup("down")])


@pytest.mark.parametrize("written_by", ["torch", "tilewright"])
def test_the_state_of_torchs_adamw_and_of_ours_are_one_anothers(processes: World, written_by: str) -> None:
    """Two steps by one, then its state into the other: the third step is that of the first going on."""
    read_by = {"torch": "tilewright", "tilewright": "torch"}[written_by]
    model, other = sharded(processes), sharded(processes)
    recipe = {
        name: Optimizer(learning_rate=1e-2, implementation=name, state_dtype="float32")  # type: ignore[arg-type]
        for name in ("torch", "tilewright")
    }
    optimizer = build_optimizer(model, recipe[written_by])
    for seed in range(2):
        step(model, optimizer, seed)
    state = training_state(model, optimizer)
    other_optimizer = build_optimizer(other, recipe[read_by])
    other_state = training_state(other, other_optimizer)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in other_state.items()
    }
    for name, tensor in other_state.items():  # as a checkpoint fills them
        tensor.detach().copy_(state[name].detach())
    step(model, optimizer, seed=2)
    step(other, other_optimizer, seed=2)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_was_found_to_be_bad_leaves_everything_and_a_scaled_gradient_is_unscaled(
    processes: World, kind: str
) -> None:
    """As a gradient scaler has it: with `found_inf` and `grad_scale` on the device, which nobody waits for."""
    recipe = Optimizer(learning_rate=1e-2, kind=kind)  # type: ignore[arg-type]
    model, plain = sharded(processes), sharded(processes)
    optimizer, plain_optimizer = build_optimizer(model, recipe), build_optimizer(plain, recipe)
    for seed in range(3):
        step(plain, plain_optimizer, seed)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
        step(model, optimizer, seed, scale=8.0)
        before = {name: tensor.detach().clone() for name, tensor in training_state(model, optimizer).items()}
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        step(model, optimizer, seed, scale=float("nan"))
        for name, tensor in training_state(model, optimizer).items():
            assert torch.equal(tensor, before[name]), name
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-5, atol=1e-6)


def test_sgd_adds_the_decay_to_the_gradient_and_keeps_a_momentum(processes: World) -> None:
    model = sharded(processes)
    name = "blocks.0.mlp.up.weight"
    expected, momentum = weights(model)[name], torch.zeros(24, 16)
    optimizer = build_optimizer(model, Optimizer(learning_rate=0.1, kind="sgd", momentum=0.8, weight_decay=0.5))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        momentum = 0.8 * momentum + (1 + 0.5 * expected)
        expected = expected - 0.1 * momentum
    torch.testing.assert_close(weights(model)[name], expected)


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="an apex is installed")
def test_apex_is_refused_where_it_is_not_nvidias(
    processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Optimizer(learning_rate=1e-3, implementation="apex")
    with pytest.raises(TrainingError, match=r"^optimizer.implementation is 'apex', but apex is not installed"):
        build_optimizer(sharded(processes), recipe)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TrainingError, match=r"is not NVIDIA's: .* an unrelated Pyramid toolkit"):
        build_optimizer(sharded(processes), recipe)


class FusedAdam(torch.optim.Optimizer):
    """Stands in for NVIDIA's, which takes CUDA tensors."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"step": 0})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                torch._fused_adamw_(
                    [p], [p.grad], [self.state[p]["exp_avg"]], [self.state[p]["exp_avg_sq"]], [],
                    [torch.tensor(float(group["step"]))], lr=group["lr"], beta1=group["betas"][0],
                    beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                    maximize=False,
                )  # fmt: skip


def test_the_steps_of_a_run_by_apex_are_torchs(processes: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tilewright.kernels.apex", "tilewright.kernels.optim"):
        monkeypatch.setattr(importlib.import_module(module), "fused_adam_class", lambda: FusedAdam)
    monkeypatch.setattr(importlib.import_module("tilewright.kernels.apex"), "_DEVICES", ("cpu",))
    inputs, targets = (torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(n)) for n in range(2))
    found = []
    for implementation in ("torch", "apex"):
        model = sharded(processes)
        recipe = Optimizer(learning_rate=1e-2, implementation=implementation, state_dtype="float32")  # type: ignore[arg-type]
        optimizer = build_optimizer(model, recipe)
        for _ in range(3):
            train_step(model, optimizer, [MicroBatch(inputs, targets, None)], processes, max_grad_norm=1.0)
        found.append(weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.kind", "adam"], "optimizer.kind.*Got value: adam"),
        (["--optimizer.momentum", "1"], "optimizer.momentum is 1.0; it must be at least 0 and less than 1"),
        (["--optimizer.ema_decay", "-0.1"], "optimizer.ema_decay is -0.1; it must be at least 0 and less than 1"),
        (["--optimizer.kind", "sgd", "--optimizer.implementation", "apex"], "'apex', which is of AdamW"),
        (["--optimizer.implementation", "torch"], "implementation is 'torch'.* optimizer.state_dtype 'bfloat16'"),
        (["--optimizer.groups", "[{match: '('}]"], r"groups\[0\].match is '\(', which is no regular expression"),
        (["--optimizer.groups", "[{match: a, weight_decay: -1}]"], r"groups\[0\].weight_decay is -1.0; it must be 0"),
        (["--optimizer.groups", "[{match: a, learning_rate: 1}]"], r"is 'optimizer.groups\[0\].learning_rate_factor'"),
        (["--optimizer.groups", "[{weight_decay: 1}]"], r"has no optimizer.groups\[0\].match; state it"),
        (["--optimizer.groups", "[mlp]"], r"optimizer.groups\[0\] in .* is 'mlp'; it must be a section of keys"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_key_named(
    tiny_recipe: Callable[..., Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_recipe(str(tiny_recipe()), overrides)
