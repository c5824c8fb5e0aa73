"""What an op's call passes by in plain eager code, and that whoever looks on still sees the op."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.kernels import library
from tilewright.kernels.library import differentiate, register


class Seen(TorchDispatchMode):
    """The ``tilewright::`` ops that are dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tilewright":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tripled() -> library.Op:
    op = register(
        "tripled_for_test(Tensor x, float by) -> Tensor", lambda x, by: x * by, lambda x, by: x.new_empty(x.shape)
    )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.by = inputs[1]

    differentiate(op, lambda ctx, upstream: (upstream * ctx.by, None), setup)
    return op


@pytest.mark.parametrize("around", ["nothing", "a dispatch mode", "compile"])
def test_the_numbers_are_the_same_however_the_call_goes(tripled: library.Op, around: str) -> None:
    x = torch.randn(5, requires_grad=True)
    call = torch.compile(tripled, backend="aot_eager", fullgraph=True) if around == "compile" else tripled
    if around == "a dispatch mode":
        with Seen() as seen:
            y = call(x, 3.0)
        assert seen.names == ["tripled_for_test"]
    else:
        y = call(x, 3.0)
    y.backward(torch.arange(5.0))
    assert torch.equal(y, 3 * x)
    assert torch.equal(x.grad, 3 * torch.arange(5.0))


def test_fake_tensors_take_the_shape_function_even_outside_their_mode(tripled: library.Op) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(5))
    assert tripled(x, 3.0).shape == (5,)


def test_no_gradient_is_recorded_where_none_is_asked_for(tripled: library.Op) -> None:
    x = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        assert not tripled(x, 3.0).requires_grad
    assert not tripled(x.detach(), 3.0).requires_grad


class OnSecondDevice(torch.Tensor):
    """A CPU tensor that says it stands on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_a_launch_runs_on_its_tensors_device_when_another_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: Any) -> None:
            entered.append("left")

    current = 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch = library._on_the_tensors_device(lambda x: entered.append("launched"))
    x = torch.zeros(2).as_subclass(OnSecondDevice)
    launch(x)
    assert entered == [torch.device("cuda", 1), "launched", "left"]
    current = 1
    launch(x)
    assert entered[3:] == ["launched"]
