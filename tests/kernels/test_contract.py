"""The contract that every op of the registry keeps. Written once; a new op gets all of it from its `OpSpec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tilewright.kernels import accuracy
from tilewright.kernels.accuracy import outputs_of
from tilewright.kernels.launch import Configuration, LaunchTable
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def cases(dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    return [
        pytest.param(spec, index, dtype, id=f"{spec.name}-{sample.label}-{str(dtype)[6:]}".replace(" ", "_"))
        for spec in SPECS
        for dtype in dtypes
        for index, sample in enumerate(spec.samples(CPU, torch.float32))
    ]


def per_spec(specs: tuple[OpSpec, ...] = SPECS) -> Any:
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


# Those with a backward pass; an optimizer's step has none.
WITH_GRADIENTS = tuple(spec for spec in SPECS if spec.differentiable(next(spec.samples(CPU, torch.float32))))


def labelled(spec: OpSpec, label: str, dtype: torch.dtype) -> Sample:
    torch.manual_seed(0)
    return next(sample for sample in spec.samples(CPU, dtype) if sample.label == label)


def sample_at(spec: OpSpec, index: int, dtype: torch.dtype) -> Sample:
    torch.manual_seed(index)
    return list(spec.samples(CPU, dtype))[index]


def small_samples(spec: OpSpec, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples that are quick to run many times."""
    torch.manual_seed(0)
    for sample in spec.samples(CPU, dtype):
        if max(x.numel() for x in sample.tensors.values()) <= 2500:
            yield sample


def run(
    function: Callable[..., Any], spec: OpSpec, sample: Sample, dtype: torch.dtype, upstream: list[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], Tensors]:
    done = accuracy.run(function, spec, sample, dtype, upstream)
    return done.outputs, done.upstream, done.gradients


def check_numbers(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> None:
    for comparison in accuracy.compare(spec, sample, dtype):
        what, ours, exact = comparison.what, comparison.ours, comparison.exact
        assert ours.shape == exact.shape
        assert ours.dtype == comparison.same.dtype
        assert not ours.isnan().any(), f"{what} holds NaN"
        # Where the exact answer is infinite (the log-sum-exp of nothing), so must ours be.
        assert torch.equal(ours.isinf(), exact.isinf()), f"{what} is infinite in other places"
        error, reference_error = comparison.error, comparison.reference_error
        assert error <= comparison.allowed(spec.tolerance), f"{what}: {error:.3g}, reference {reference_error:.3g}"


@pytest.mark.parametrize(("spec", "index", "dtype"), cases((torch.float32, torch.float16)))
def test_error_against_float64_is_within_twice_that_of_pytorch(spec: OpSpec, index: int, dtype: torch.dtype) -> None:
    check_numbers(spec, sample_at(spec, index, dtype), dtype)


# Triton's interpreter holds bfloat16 as its bits, which a matrix product there would multiply as integers.
@per_spec(tuple(spec for spec in SPECS if spec.name != "attention"))
def test_error_in_bfloat16_is_within_twice_that_of_pytorch(spec: OpSpec) -> None:
    for sample in small_samples(spec, torch.bfloat16):
        check_numbers(spec, sample, torch.bfloat16)


def differing_in_blocks(choices: list[Configuration]) -> list[Configuration]:
    """Of those that differ in warps and stages alone, which the interpreter does not have, the one for most sizes."""
    return [
        choice
        for place, choice in enumerate(choices)
        if not any(
            other.blocks == choice.blocks and (other.up_to, -number) > (choice.up_to, -place)
            for number, other in enumerate(choices)
        )
    ]


def forced_configurations() -> Iterator[Any]:
    for spec in SPECS:
        for kernel, table in spec.tables.items():
            for configuration in differing_in_blocks(table.choices()):
                label = f"{spec.name}-{kernel}-{configuration.blocks}-{configuration.up_to}".replace(" ", "")
                yield pytest.param(spec, table, configuration, id=label)


@pytest.mark.parametrize(("spec", "table", "configuration"), forced_configurations())
def test_every_launch_configuration_gives_the_right_numbers(
    spec: OpSpec, table: LaunchTable, configuration: Configuration
) -> None:
    with table.force(configuration):
        for sample in spec.samples(CPU, torch.float32):
            check_numbers(spec, sample, torch.float32)


def strided(gradient: torch.Tensor) -> torch.Tensor:
    """The same numbers with a stride of 2 along the last dimension and padding between rows."""
    if gradient.ndim == 0:
        return gradient
    wide = gradient.new_zeros(*gradient.shape[:-1], 2 * gradient.shape[-1] + 3)
    view = wide[..., : 2 * gradient.shape[-1] : 2]
    return view.copy_(gradient)


@per_spec(WITH_GRADIENTS)
def test_upstream_gradients_of_any_stride_give_the_same_gradients(spec: OpSpec) -> None:
    for sample in small_samples(spec, torch.float32):
        outputs, dense, expected = run(spec.function, spec, sample, torch.float32, None)
        _, _, got = run(spec.function, spec, sample, torch.float32, [strided(g) for g in dense])
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=f"{name}, strided")
        # What sum().backward() sends: one number, expanded with stride 0.
        ones = [torch.ones_like(o) for o in outputs]
        _, _, expected = run(spec.function, spec, sample, torch.float32, ones)
        _, _, got = run(spec.function, spec, sample, torch.float32, [torch.ones(()).expand(o.shape) for o in outputs])
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=f"{name}, expanded")


@per_spec()
def test_two_runs_agree_to_the_bit(spec: OpSpec) -> None:
    for sample in small_samples(spec, torch.float16):
        first, upstream, first_gradients = run(spec.function, spec, sample, torch.float16, None)
        second, _, second_gradients = run(spec.function, spec, sample, torch.float16, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in first_gradients)


@per_spec()
def test_inputs_are_left_as_they_were(spec: OpSpec) -> None:
    for sample in small_samples(spec, torch.float32):
        before = {name: x.clone() for name, x in sample.tensors.items()}
        run(spec.function, spec, sample, torch.float32, None)
        assert all(torch.equal(before[name], x) for name, x in sample.tensors.items())


@per_spec(WITH_GRADIENTS)
def test_a_second_derivative_is_refused_rather_than_wrong(spec: OpSpec) -> None:
    sample = next(small_samples(spec, torch.float32))
    tensors = {name: x.detach().clone() for name, x in sample.tensors.items()}
    inputs = [tensors[name].requires_grad_() for name in spec.differentiable(sample)]
    result = outputs_of(spec.function(**tensors, **sample.options))[0]
    # A product with the result makes the gradient depend on the inputs in a way that only a second backward sees.

    def second_derivative() -> None:
        (gradient, *_) = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
        torch.autograd.grad(gradient.sum(), inputs, allow_unused=True)

    with pytest.raises(RuntimeError, match="second derivatives"):
        second_derivative()


@per_spec(WITH_GRADIENTS)
def test_a_backward_pass_run_twice_gives_the_same_gradients(spec: OpSpec) -> None:
    sample = next(small_samples(spec, torch.float32))
    tensors = {name: x.detach().clone() for name, x in sample.tensors.items()}
    inputs = [tensors[name].requires_grad_() for name in spec.differentiable(sample)]
    result = outputs_of(spec.function(**tensors, **sample.options))[0]
    upstream = torch.randn(result.shape)
    first = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(result, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@per_spec()
def test_torch_library_accepts_every_registered_op(spec: OpSpec) -> None:
    """`opcheck` on each ``tilewright::`` op as the public function really calls it, its backward ops included."""
    for sample in small_samples(spec, torch.float32):
        differentiable = bool(spec.differentiable(sample))
        calls = recorded_calls(
            lambda sample=sample: run(spec.function, spec, sample, torch.float32, None), differentiable
        )
        assert calls, "the Triton path called no registered op"
        for op, args, kwargs in calls:
            torch.library.opcheck(op, args, kwargs)


Calls = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]


def recorded_calls(action: Callable[[], Any], differentiable: bool) -> Calls:
    """The ``tilewright::`` calls that `action` makes, forward ones with inputs that ask for gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "tilewright":
                forward = differentiable and not func._opname.endswith("backward")
                copies = tuple(
                    a.detach().clone().requires_grad_(forward and a.is_floating_point())
                    if isinstance(a, torch.Tensor)
                    else a
                    for a in args
                )
                calls.append((func, copies, dict(kwargs or {})))
            return func(*args, **(kwargs or {}))

    with Recorder():
        action()
    return calls


@per_spec()
def test_compiles_into_one_graph_with_the_same_numbers(spec: OpSpec) -> None:
    sample = next(small_samples(spec, torch.float32))
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    expected, upstream, expected_gradients = run(spec.function, spec, sample, torch.float32, None)
    got, _, gradients = run(compiled, spec, sample, torch.float32, upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name])


@per_spec(WITH_GRADIENTS)
def test_selective_checkpointing_keeps_the_ops_result_instead_of_computing_it_again(spec: OpSpec) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    sample = next(small_samples(spec, torch.float32))
    seen: list[bool] = []  # for each forward call of the op: whether it was a recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if getattr(op, "namespace", "") == "tilewright":
            seen.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    tensors = {name: x.detach().clone() for name, x in sample.tensors.items()}
    inputs = [tensors[name].requires_grad_() for name in spec.differentiable(sample)]
    results = checkpoint(
        lambda: spec.function(**tensors, **sample.options),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    first = outputs_of(results)[0]
    upstream = torch.randn(first.shape)
    gradients = torch.autograd.grad(first, inputs, upstream, allow_unused=True)
    assert seen.count(False) >= 1
    plain = torch.autograd.grad(outputs_of(spec.function(**tensors, **sample.options))[0], inputs, upstream)
    for got, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(got, expected)


def far_apart(x: torch.Tensor, path: Any) -> torch.Tensor:
    """`x` (3, …) with its last entry past 2³¹ elements, in a sparse file that fills no disk.

    The stride itself stays below 2³¹, so that the product of row and stride overflows where it is computed in 32 bits.
    """
    width = x[0].numel()
    gap = 2**30 + 16
    storage = torch.UntypedStorage.from_file(str(path), True, (2 * gap + width) * x.element_size())
    far = torch.empty(0, dtype=x.dtype).set_(storage, 0, (3, width), (gap, 1))
    return far.copy_(x.reshape(3, width)).view(x.shape)


@per_spec()
def test_elements_past_two_to_the_31_are_addressed_rightly(spec: OpSpec, tmp_path: Any) -> None:
    sample = labelled(spec, "three rows", torch.float16)
    expected, upstream, expected_gradients = run(spec.function, spec, sample, torch.float16, None)
    names = spec.differentiable(sample)
    far = {
        name: far_apart(x, tmp_path / name).requires_grad_(name in names) if name in spec.strided else x
        for name, x in sample.tensors.items()
    }
    differentiated = [name for name in names if name in spec.strided]
    got = outputs_of(spec.function(**far, **sample.options))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if not differentiated:
        return
    gradients = torch.autograd.grad(got, [far[name] for name in differentiated], upstream)
    for name, gradient in zip(differentiated, gradients, strict=True):
        assert torch.equal(gradient, expected_gradients[name]), name


def with_rows(sample: Sample, count: int) -> dict[str, torch.Tensor]:
    """The tensors of a sample of three rows, with more of them; what has other than three entries stays as it is."""
    return {
        name: torch.cat([x, x[:1].expand(count - 3, *x.shape[1:])]) if x.ndim and x.shape[0] == 3 else x
        for name, x in sample.tensors.items()
    }


@per_spec()
def test_compiles_once_for_any_number_of_rows(spec: OpSpec) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    sample = labelled(spec, "three rows", torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []  # one at first, or two: PyTorch begins again where it finds a float to be a constant
    for count in (11, 13, 17):  # none of them another size of the sample, with which the compiler would tie it
        larger = Sample(f"{count} rows", with_rows(sample, count), sample.options, sample.float32)
        expected, upstream, expected_gradients = run(spec.function, spec, larger, torch.float32, None)
        got, _, gradients = run(compiled, spec, larger, torch.float32, upstream)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        for name in gradients:
            torch.testing.assert_close(gradients[name], expected_gradients[name])
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@per_spec()
def test_no_rows_give_no_rows(spec: OpSpec) -> None:
    sample = labelled(spec, "no rows", torch.float32)
    got, upstream, gradients = run(spec.function, spec, sample, torch.float32, None)
    expected, _, expected_gradients = run(spec.reference, spec, sample, torch.float32, upstream)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for name in expected_gradients:
        assert torch.equal(gradients[name], expected_gradients[name]), name


@per_spec(WITH_GRADIENTS)
def test_torch_func_and_forward_mode_are_refused_by_name(spec: OpSpec) -> None:
    sample = next(spec.samples(CPU, torch.float32))
    name = spec.differentiable(sample)[0]
    others = {other: x for other, x in sample.tensors.items() if other != name}

    def total(x: torch.Tensor) -> torch.Tensor:
        return outputs_of(spec.function(**{name: x}, **others, **sample.options))[0].sum()

    with pytest.raises(RuntimeError, match=r"use backward\(\) or torch\.autograd\.grad\(\)"):
        torch.func.grad(total)(sample.tensors[name])
    with pytest.raises(RuntimeError, match=r"use backward\(\) or torch\.autograd\.grad\(\)"):
        torch.func.jvp(total, (sample.tensors[name],), (torch.ones_like(sample.tensors[name]),))
