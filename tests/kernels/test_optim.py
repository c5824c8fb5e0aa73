"""`AdamW` as an optimizer: its numbers against torch's own, few launches, state dicts, schedulers and shards."""

import copy
import importlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.kernels import AdamW, choose, clip_coefficient, use
from tilewright.kernels.shards import first_element, local

kernel = importlib.import_module("tilewright.kernels.adamw")
apex = importlib.import_module("tilewright.kernels.apex")
BFLOAT16 = torch.bfloat16
both = pytest.mark.parametrize("implementation", ["triton", "reference"])
SHAPES = ((1,), (7,), (127,), (1000,), (33, 40), (), (0, 5))


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """The same numbers at the same step, whatever the dtype; some small, some large."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate(params):
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (number % 4 - 2)).to(BFLOAT16).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: int, first: int = 0, **options: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step(**options)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """As a trainer has them: some decayed, the others not."""
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0, "lr": 0.03}]


def assert_equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 1e-5, "maximize": True}], ids=["usual", "other"])
def test_many_steps_err_no_more_than_twice_as_much_as_torchs_adamw(implementation: str, options: Any) -> None:
    shapes = (*SHAPES, (4097,))
    exact, same, ours = parameters(torch.float64, shapes), parameters(shapes=shapes), parameters(shapes=shapes)
    for x, y in zip(exact, same, strict=True):
        x.data.copy_(y)
    train(torch.optim.AdamW(groups(exact), lr=0.01, **options), 20)
    train(torch.optim.AdamW(groups(same), lr=0.01, **options), 20)
    train(AdamW(groups(ours), lr=0.01, implementation=implementation, **options), 20)
    for x, y, z in zip(ours, same, exact, strict=True):
        if x.numel():
            error, theirs = (x.double() - z).abs().max(), (y.double() - z).abs().max()
            assert error <= 2 * theirs + torch.finfo(torch.float32).eps * z.abs().max()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, by name."""
    seen: list[str] = []

    class Seen:
        def __init__(self, original: Any, name: str) -> None:
            self.original, self.name = original, name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(self.name)
            return self.original[grid]

    for name in ("_advance", "_update"):
        monkeypatch.setattr(kernel, name, Seen(getattr(kernel, name), name))
    return seen


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tables sent to the device."""
    seen: list[tuple[int, ...]] = []
    original = kernel._sent

    def record(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return original(x, device)

    monkeypatch.setattr(kernel, "_sent", record)
    return seen


def test_fifty_tensors_are_stepped_in_two_launches_and_their_tables_sent_once(
    launches: list[str], sent: list[tuple[int, ...]]
) -> None:
    params = parameters(shapes=[(8 * n,) for n in range(1, 51)])
    optimizer = AdamW(params)
    give_gradients(params, 0)
    optimizer.step()
    assert launches == ["_advance", "_update"]
    sent.clear()
    optimizer.step()  # the same gradients, in place
    assert sent == []
    kept = [p.grad for p in params]  # so that the new ones are elsewhere
    give_gradients(params, 1)
    optimizer.step()
    assert sent == [(50,)]  # the pointers of the gradients alone
    assert launches == ["_advance", "_update"] * 3
    assert kept[0] is not None


@both
def test_parameters_that_moved_are_found_where_they_are(implementation: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, other = (AdamW(x, lr=0.1, implementation=implementation) for x in (ours, theirs))
    train(optimizer, 1)
    for p in ours:
        p.data = p.data.clone()
    optimizer.state[ours[3]]["exp_avg"] = optimizer.state[ours[3]]["exp_avg"].clone()
    train(optimizer, 1, first=1)
    train(other, 2)
    assert_equal(ours, theirs)


@both
def test_a_parameter_that_is_laid_out_anew_where_it_was_is_stepped_there_alone(implementation: str) -> None:
    memory, parameter = torch.ones(4, 5), nn.Parameter(torch.empty(2, 3))
    optimizer = AdamW([parameter], lr=0.5, weight_decay=0.0, implementation=implementation)
    for view in (memory.view(-1)[:6].view(2, 3), memory[:2, :3]):  # one place, one length
        memory.fill_(1.0)
        parameter.data, parameter.grad = view, torch.ones(2, 3)
        optimizer.step()
    expected = torch.ones(4, 5)
    expected[:2, :3] = 0.5
    torch.testing.assert_close(memory, expected)


@both
def test_parameters_may_be_swapped_between_steps(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    optimizer = AdamW(module.parameters(), lr=0.1, implementation=implementation)
    train(optimizer, 1)
    optimizer.zero_grad()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    module.to(BFLOAT16)
    before = module.weight.detach().clone()
    train(optimizer, 1, first=1)
    assert (module.weight != before).all()


@both
def test_low_bits_of_a_parameter_that_is_bfloat16_no_longer_are_dropped(implementation: str) -> None:
    parameter = nn.Parameter(torch.ones(16, dtype=BFLOAT16))
    optimizer = AdamW([parameter], lr=0.1, rounding="low bits", implementation=implementation)
    train(optimizer, 1)
    parameter.grad = None
    parameter.data = parameter.data.float()
    train(optimizer, 1, first=1)
    assert "low_bits" not in optimizer.state[parameter]
    assert (parameter - 1.0).abs().max() < 0.3


@both
def test_a_backward_pass_through_parameters_that_were_stepped_since_is_an_error(implementation: str) -> None:
    parameter, x = nn.Parameter(torch.ones(8)), torch.ones(8, requires_grad=True)
    loss = (parameter * x).sum()
    train(AdamW([parameter], implementation=implementation), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "low bits"])
@pytest.mark.parametrize("state_dtype", [torch.float32, BFLOAT16])
def test_bfloat16_training_stays_near_float64s_and_gives_the_same_twice(
    implementation: str, rounding: str, state_dtype: torch.dtype
) -> None:
    exact = parameters(torch.float64, shapes=[(1000,), (1001,)])
    for x in exact:
        x.data = x.data.to(BFLOAT16).double()
    train(torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.1), 20)
    runs = []
    for _ in range(2):
        params = parameters(BFLOAT16, shapes=[(1000,), (1001,)])
        options = {"state_dtype": state_dtype, "rounding": rounding, "implementation": implementation, "seed": 7}
        optimizer = AdamW(params, lr=1e-3, weight_decay=0.1, **options)
        train(optimizer, 20)
        state = optimizer.state[params[0]]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state_dtype
        assert ("low_bits" in state) == (rounding == "low bits")
        runs.append(params)
    assert_equal(*runs)
    off = torch.cat([a.double() - b for a, b in zip(runs[0], exact, strict=True)]).abs().mean()
    # The spacing of bfloat16 at 1 is 0.008. Low bits: half a spacing's half; stochastic: a random walk of roundings.
    assert off < {"nearest": 0.02, "stochastic": 0.005, "low bits": 0.0012}[rounding]


def test_float32_parameters_beside_bfloat16_ones_are_left_out_of_the_rounding() -> None:
    mixed = [*parameters(BFLOAT16, shapes=[(64,)]), *parameters(shapes=[(64,)])]
    plain = parameters(shapes=[(64,)])
    optimizer = AdamW(mixed, rounding="low bits")
    train(optimizer, 1)
    plain[0].grad = mixed[1].grad
    AdamW(plain).step()
    assert torch.equal(mixed[1], plain[0])
    assert "low_bits" not in optimizer.state[mixed[1]]


@both
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_clipping_scales_the_gradients_as_they_are_read_and_leaves_them_as_they_were(
    implementation: str, dtype: torch.dtype
) -> None:
    clipped, scaled = parameters(dtype), parameters(dtype)
    ours, theirs = (AdamW(x, lr=0.1, implementation=implementation) for x in (clipped, scaled))
    for step in range(3):
        give_gradients(clipped, step)
        give_gradients(scaled, step)
        before = [p.grad.clone() for p in clipped if p.grad is not None]
        coefficient, norm = clip_coefficient(clipped, 2.0)
        total = torch.cat([x.double().flatten() for x in before]).norm()
        assert float(norm) == pytest.approx(float(total), rel=0.01)
        assert float(coefficient) == pytest.approx(min(1.0, 2.0 / (float(norm) + 1e-6)), rel=0.01)
        ours.step(clip=0.125 if step == 0 else torch.tensor(0.125))
        for p in scaled:
            assert p.grad is not None
            p.grad *= 0.125
        theirs.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(clipped, before, strict=True) if p.grad is not None)
    assert_equal(clipped, scaled)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_the_norm_of_16_bit_gradients_is_float32(dtype: torch.dtype) -> None:
    """In float16 this norm is infinite, and the coefficient 0; in bfloat16 it has three digits."""
    (parameter,) = parameters(dtype, shapes=((1000,),))
    parameter.grad = torch.full_like(parameter, 60000.0)
    coefficient, norm = clip_coefficient([parameter], 1.0)
    exact = parameter.grad.double().norm()
    torch.testing.assert_close(norm, exact.float())
    torch.testing.assert_close(coefficient, (1.0 / exact).float())


@both
def test_a_coefficient_may_have_one_dimension_and_another_dtype(implementation: str) -> None:
    ours, theirs = parameters(), parameters()
    train(AdamW(ours, implementation=implementation), 1, clip=torch.tensor([0.5], dtype=torch.float64))
    train(AdamW(theirs, implementation=implementation), 1, clip=0.5)
    assert_close(ours, theirs)


def test_a_coefficient_leaves_small_gradients_alone() -> None:
    params = parameters(shapes=[(3,), (2, 2)])
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    coefficient, norm = clip_coefficient(params, 1.0)
    assert coefficient == 1.0
    assert float(norm) == pytest.approx(0.1 * 7**0.5)


@both
def test_gradscaler_unscales_and_skips_on_the_device(implementation: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, plain = (AdamW(x, lr=0.1, implementation=implementation) for x in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, overflows in enumerate((True, False, True, False)):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        scaler.scale(torch.zeros(()))  # a backward pass would have scaled the gradients by it
        factor = scaler.get_scale()
        for p in ours:
            assert p.grad is not None
            p.grad *= factor
        if overflows:
            assert ours[3].grad is not None
            ours[3].grad[10] = torch.inf
        else:
            plain.step()
        scaler.step(optimizer)
        scaler.update()
    assert_equal(ours, theirs)
    assert all(optimizer.state[p]["step"] == 2 for p in ours)


def torchs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.3)


def tilewrights(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02, weight_decay=0.3)


@pytest.mark.parametrize(
    ("first", "second"), [(torchs, tilewrights), (tilewrights, torchs), (tilewrights, tilewrights)]
)
def test_a_state_dict_of_either_adamw_goes_on_in_the_other(
    first: Callable[..., Any], second: Callable[..., Any], tmp_path: Path
) -> None:
    whole, saved = parameters(), parameters()
    train(torchs(whole), 6)
    optimizer = first(saved)
    train(optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    # Other numbers, which those saved replace.
    going_on = second([p.detach().clone().requires_grad_() for p in saved])
    going_on.param_groups[0]["lr"] = 5.0
    going_on.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(going_on, 3, first=3)
    assert_close(going_on.param_groups[0]["params"], whole)
    state = going_on.state_dict()["state"]
    assert set(state[0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(state[0]["step"]) == 6


@both
@pytest.mark.parametrize("rounding", ["low bits", "stochastic"])
@pytest.mark.parametrize("state_dtype", [torch.float32, BFLOAT16])
def test_a_bfloat16_run_goes_on_from_its_state_dict_as_if_it_had_not_stopped(
    implementation: str, rounding: str, state_dtype: torch.dtype
) -> None:
    options = {"rounding": rounding, "state_dtype": state_dtype, "implementation": implementation}
    whole, saved = (parameters(BFLOAT16, shapes=((1,), (127,), (33, 40))) for _ in range(2))
    train(AdamW(whole, lr=0.01, seed=5, **options), 6)
    optimizer = AdamW(saved, lr=0.01, seed=5, **options)
    train(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    going_on = AdamW([p.detach().clone().requires_grad_() for p in saved], lr=0.7, **options)
    going_on.load_state_dict(torch.load(file, weights_only=True))
    train(going_on, 3, first=3)
    assert_equal(going_on.param_groups[0]["params"], whole)


def test_a_seed_that_the_state_dict_does_not_hold_stays_each_groups_own() -> None:
    params = parameters()
    other = torch.optim.AdamW(groups(params))
    optimizer = AdamW([{**group, "seed": seed} for seed, group in enumerate(groups(params), 5)])
    optimizer.load_state_dict(other.state_dict())
    assert [group["seed"] for group in optimizer.param_groups] == [5, 6]


def test_how_a_step_is_computed_stays_as_the_optimizer_was_built() -> None:
    saved = AdamW(parameters(BFLOAT16), rounding="low bits", lr=0.5, implementation="reference")
    train(saved, 1)
    optimizer = AdamW(parameters(BFLOAT16), rounding="stochastic", state_dtype=BFLOAT16, seed=3)
    seen: list[torch.dtype] = []
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["exp_avg"].dtype)
    )
    optimizer.load_state_dict(saved.state_dict())
    group = optimizer.param_groups[0]
    assert (group["rounding"], group["state_dtype"], group["implementation"]) == ("stochastic", BFLOAT16, "auto")
    assert (group["lr"], group["seed"]) == (0.5, 0)
    state = optimizer.state[group["params"][3]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert seen == [state["exp_avg"].dtype] == [BFLOAT16]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(copied: Callable[..., Any]) -> None:
    params = parameters(BFLOAT16)
    optimizer = AdamW(params, lr=0.01, rounding="low bits")
    train(optimizer, 2)
    twin = copied(optimizer)
    before = [p.detach().clone() for p in params]
    train(twin, 2, first=2)
    assert_equal(params, before)  # type: ignore[arg-type]
    train(optimizer, 2, first=2)
    assert_equal(twin.param_groups[0]["params"], params)


@both
def test_schedulers_tensors_as_learning_rate_and_closures_work_as_with_torchs(implementation: str) -> None:
    ours, theirs = parameters(), parameters()
    rate = torch.tensor(0.1)
    optimizer = AdamW(ours, lr=rate, implementation=implementation)
    other = torch.optim.AdamW(theirs, lr=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, other)]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)

        def closure() -> torch.Tensor:
            assert torch.is_grad_enabled()
            return torch.tensor(3.0)

        assert optimizer.step(closure) == 3.0
        other.step()
        for schedule in schedules:
            schedule.step()
    assert float(rate) == pytest.approx(0.025)
    assert_close(ours, theirs)


@both
def test_parameters_without_a_gradient_are_left_alone_and_count_their_own_steps(implementation: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, other = AdamW(ours, lr=0.1, implementation=implementation), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(4):
        for params, o in ((ours, optimizer), (theirs, other)):
            give_gradients(params, step)
            if step < 3:
                params[3].grad = None
            o.step()
        assert (ours[3] in optimizer.state) == (step == 3)
    assert optimizer.state[ours[3]]["step"] == 1
    assert optimizer.state[ours[2]]["step"] == 4
    assert_close(ours, theirs)


def made_up(kind: str) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A parameter's data in some order of memory, and the gradient in another."""
    torch.manual_seed(2)
    base = torch.randn(6, 8, 10, 12)
    return {
        "transposed": (base.permute(3, 1, 0, 2), lambda g: g.contiguous()),
        "channels last": (base.to(memory_format=torch.channels_last), lambda g: g.contiguous()),
        "with gaps": (base[:, 1:6:2, :, 1:], lambda g: g),
        "expanded gradient": (base, lambda g: g[:1, :, :, :1].expand(g.shape)),
    }[kind]


@both
@pytest.mark.parametrize("kind", ["transposed", "channels last", "with gaps", "expanded gradient"])
def test_parameters_and_gradients_of_any_stride_are_stepped_in_place(implementation: str, kind: str) -> None:
    data, laid_out = made_up(kind)
    ours, theirs = nn.Parameter(data), nn.Parameter(data.clone(memory_format=torch.contiguous_format))
    assert ours.stride() == data.stride()
    optimizer, other = AdamW([ours], lr=0.1, implementation=implementation), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        give_gradients([theirs], step)
        assert theirs.grad is not None
        ours.grad = laid_out(theirs.grad)
        theirs.grad = ours.grad.contiguous()
        optimizer.step()
        other.step()
        if step == 1:  # state that is laid out otherwise
            optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert ours.data_ptr() == data.data_ptr()
    torch.testing.assert_close(ours.contiguous(), theirs.data, rtol=1e-5, atol=1e-6)


@both
def test_float64_runs_in_float64_through_the_reference_alone(implementation: str) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = AdamW(ours, lr=0.1, implementation=implementation)
    if implementation == "triton":
        give_gradients(ours, 0)
        with pytest.raises(ValueError, match=r"take float32, float16 and bfloat16, not torch.float64"):
            optimizer.step()
        return
    train(optimizer, 3)
    train(torch.optim.AdamW(theirs, lr=0.1), 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_choice_and_its_reason_can_be_asked_for() -> None:
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "implementation": "reference"}])
    with use("auto"):
        assert optimizer.choose(params[0]) == choose(torch.device("cpu"), torch.float32)
    with use("triton"):
        assert optimizer.choose(params[0]).implementation == "triton"
        assert optimizer.choose(params[2]) == ("reference", "demanded by implementation='reference'")
    with pytest.raises(ValueError, match="in none of the optimizer's groups"):
        optimizer.choose(torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr is -1.0; it must be at least 0"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\); it must be one number"),
        ({"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\)"),
        ({"eps": -1.0}, r"eps is -1.0"),
        ({"weight_decay": -1.0}, r"weight_decay is -1.0"),
        ({"amsgrad": True}, r"amsgrad is True; it must be False"),
        ({"state_dtype": torch.float16}, r"state_dtype is torch.float16; it must be torch.float32 or torch.bfloat16"),
        ({"rounding": "up"}, r"rounding is 'up'; it must be one of nearest, stochastic, low bits"),
        ({"implementation": "cuda"}, r"implementation is 'cuda'; it must be one of auto, triton, reference, apex"),
        ({"seed": 1 << 63}, r"seed is 9223372036854775808"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)
    if "amsgrad" not in options:  # of a group as well
        optimizer = AdamW(parameters())
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
        assert len(optimizer.param_groups) == 1


def test_parameters_and_gradients_that_cannot_be_stepped_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"parameter number 1 of its group has dtype torch.complex64"):
        AdamW([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"parameter head has dtype torch.complex64"):
        AdamW([("head", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match=r"rounding is 'stochastic' and parameter number 0 of its group float16"):
        AdamW([nn.Parameter(torch.ones(2).half())], rounding="stochastic")
    params = [nn.Parameter(torch.ones(2))]
    optimizer = AdamW(params)
    params[0].grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(2,\) is sparse .*; it must be dense"):
        optimizer.step()
    params[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"clip has shape \(2,\); it must be one number"):
        optimizer.step(clip=torch.ones(2))
    amsgrad = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        optimizer.load_state_dict(amsgrad.state_dict())
    other = AdamW([nn.Parameter(torch.ones(3))])
    train(other, 1)
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"state of a parameter has shape \(3,\); it must be \(2,\)"):
        optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"state of a parameter is on meta and the parameter on cpu"):
        optimizer.step()
    params[0].data = torch.ones(500)  # PyTorch keeps the gradient, of which a kernel would read past the end
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(500,\) on cpu has shape \(2,\)"):
        optimizer.step()
    params[0].grad, params[0].grad_dtype = None, torch.float64
    params[0].grad = torch.ones(500, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"has dtype torch.float64 and the parameter torch.float32"):
        optimizer.step()


FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                m.lerp_(p.grad.float(), 1 - beta1)
                v.lerp_(p.grad.float() ** 2, 1 - beta2)
                update = m / (1 - beta1 ** group["step"])
                update /= (v / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.copy_(p - group["lr"] * (update + group["weight_decay"] * p))
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path, for packages that are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def test_apex_is_refused_where_it_is_absent_another_package_or_without_its_extensions(packages: Path) -> None:
    with pytest.raises(ValueError, match="apex is not installed"):
        AdamW(parameters(), implementation="apex")
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("raise AssertionError('the impostor was imported')")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"is not NVIDIA's: .* an unrelated Pyramid toolkit: pip uninstall apex"):
        AdamW(parameters(), implementation="apex")
    (packages / "apex" / "__init__.py").write_text("")
    (packages / "apex" / "optimizers").mkdir()
    (packages / "apex" / "optimizers" / "__init__.py").write_text(FUSED_ADAM)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"its FusedAdam cannot be used \(No module named 'amp_C'\)"):
        AdamW(parameters(), implementation="apex")


def test_the_real_apex_is_used_on_demand_for_what_it_covers(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / "apex" / "optimizers").mkdir(parents=True)
    (packages / "apex" / "__init__.py").write_text("")
    (packages / "apex" / "optimizers" / "__init__.py").write_text(FUSED_ADAM)
    (packages / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(groups(ours), lr=0.02, implementation="apex")
    give_gradients(ours, 0)
    with pytest.raises(ValueError, match="takes CUDA tensors, and a parameter is on cpu"):
        optimizer.step()
    assert AdamW(ours).choose(ours[0]).implementation == "triton"  # never but on demand
    monkeypatch.setattr(apex, "_DEVICES", ("cpu",))
    assert optimizer.choose(ours[0]) == ("apex", "demanded by implementation='apex'")
    other = torch.optim.AdamW(groups(theirs), lr=0.02)
    for step in range(4):  # one tensor misses a step, so that a group has two counts
        for params, o in ((ours, optimizer), (theirs, other)):
            give_gradients(params, step)
            if step == 1:
                params[3].grad = None
            o.step()
    assert_close(ours, theirs)
    assert optimizer.state[ours[3]]["step"] == 3
    for clip in (0.5, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="neither clips nor unscales"):
            optimizer.step(clip=clip)
    for options, message in (
        ({"maximize": True}, "does not maximize"),
        ({"state_dtype": BFLOAT16}, "keeps its state in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW(ours, implementation="apex", **options).step()
    kept = parameters(BFLOAT16)
    with pytest.raises(ValueError, match="rounds to nearest, and rounding is 'low bits'"):
        AdamW(kept, implementation="apex", rounding="low bits").choose(kept[0])


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process alone, over gloo."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_model(mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)).to(BFLOAT16)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward(model: nn.Module, step: int) -> None:
    torch.manual_seed(10 + step)
    model(torch.randn(4, 16, dtype=BFLOAT16)).square().sum().backward()


@both
def test_sharded_models_train_and_go_on_from_a_distributed_checkpoint(
    alone: Any, implementation: str, tmp_path: Path
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.tensor import DTensor

    model = sharded_model(alone)
    optimizer = AdamW(model.parameters(), lr=0.01, rounding="low bits", implementation=implementation)

    def step(model: nn.Module, optimizer: AdamW, number: int) -> None:
        backward(model, number)
        coefficient, norm = clip_coefficient(model.parameters(), 0.5)
        assert not isinstance(norm, DTensor)
        optimizer.step(clip=coefficient)
        optimizer.zero_grad()

    plain = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)).to(BFLOAT16)
    plain.load_state_dict({name: x.full_tensor() for name, x in model.state_dict().items()})
    other = AdamW(plain.parameters(), lr=0.01, rounding="low bits", implementation=implementation)
    for number in range(2):
        step(model, optimizer, number)
        step(plain, other, number)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        assert isinstance(optimizer.state[ours]["low_bits"], DTensor)
        assert torch.equal(ours.full_tensor(), theirs)

    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "checkpoint")
    twin = sharded_model(alone)
    twin.load_state_dict(model.state_dict())
    resumed = AdamW(twin.parameters(), lr=0.5, rounding="low bits", implementation=implementation)
    loaded = {"optimizer": get_optimizer_state_dict(twin, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    set_optimizer_state_dict(twin, resumed, loaded["optimizer"])
    for number in range(2, 4):
        step(model, optimizer, number)
        step(twin, resumed, number)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        state, other_state = optimizer.state[ours], resumed.state[theirs]
        assert state["step"] == other_state["step"] == 4
        assert all(torch.equal(state[n].full_tensor(), other_state[n].full_tensor()) for n in ("exp_avg", "low_bits"))


@pytest.fixture
def fifth_of_six() -> Iterator[None]:
    """A process group as the fifth of six processes sees it, the others not there.

    One rank a test session: DTensor remembers meshes by their shape alone.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=4, world_size=6)
    yield
    dist.destroy_process_group()


@both
@pytest.mark.parametrize("copies", [1, 2])
def test_stochastic_rounding_is_the_same_on_any_number_of_processes(
    fifth_of_six: None, implementation: str, copies: int
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    # All six in one row; or in two rows, each of which holds the whole in three parts.
    mesh = init_device_mesh("cpu", (6,) if copies == 1 else (2, 3))
    placements = [Shard(0)] if copies == 1 else [Replicate(), Shard(0)]

    def part(x: torch.Tensor, placements: Any = placements) -> torch.Tensor:
        return distribute_tensor(x.detach().clone(), mesh, placements, src_data_rank=None)

    shapes = ((10, 12), (3, 8), (37,))
    whole, full = parameters(BFLOAT16, shapes=shapes), parameters(BFLOAT16, shapes=shapes)
    train(AdamW(whole, lr=0.01, rounding="stochastic", implementation=implementation), 2)
    parts = [nn.Parameter(part(x)) for x in full]
    optimizer = AdamW(parts, lr=0.01, rounding="stochastic", implementation=implementation)
    for step in range(2):
        give_gradients(full, step)
        for p, x in zip(parts, full, strict=True):
            assert x.grad is not None
            p.grad = part(x.grad)
        optimizer.step()
    assert [local(p).numel() for p in parts] == ([24, 0, 7] if copies == 1 else [48, 8, 13])
    for p, x in zip(parts, whole, strict=True):
        assert torch.equal(local(p), local(part(x)))
    # Of a tensor divided by columns no two elements are rounded with the same bits.
    columns = [*placements[:-1], Shard(1)]
    assert first_element(part(torch.zeros(5, 12), columns)) == (4 * 60 if copies == 1 else 60)
    parts[0].grad = part(torch.ones(10, 12, dtype=BFLOAT16), columns)
    with pytest.raises(ValueError, match="is laid over the processes as"):
        optimizer.step()
