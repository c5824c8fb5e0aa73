"""The contract that every op of the registry keeps. Written once; a new op gets all of it from its `OpSpec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

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


def per_spec() -> Any:
    return pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def sample_at(spec: OpSpec, index: int, dtype: torch.dtype) -> Sample:
    torch.manual_seed(index)
    return list(spec.samples(CPU, dtype))[index]


def small_samples(spec: OpSpec, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples that are quick to run many times."""
    torch.manual_seed(0)
    for sample in spec.samples(CPU, dtype):
        if max(x.numel() for x in sample.tensors.values()) <= 2500:
            yield sample


def outputs_of(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run(
    function: Callable[..., Any], spec: OpSpec, sample: Sample, dtype: torch.dtype, upstream: list[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], Tensors]:
    """Outputs, upstream gradients (drawn where none are given) and the gradient of each differentiable tensor."""
    names = spec.differentiable(sample)
    tensors: Tensors = {}
    for name, x in sample.tensors.items():
        # detach() keeps the strides; a change of dtype keeps the values.
        tensors[name] = x.detach().to(sample.dtype_of(name, dtype)) if x.is_floating_point() else x
        if name in names:
            tensors[name].requires_grad_()
    results = outputs_of(function(**tensors, **sample.options))
    if upstream is None:
        upstream = [torch.randn(r.shape).to(r.dtype) for r in results]
    upstream = [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
    gradients = torch.autograd.grad(results, [tensors[name] for name in names], upstream)
    return [r.detach() for r in results], upstream, dict(zip(names, gradients, strict=True))


def assert_close_to_exact(
    spec: OpSpec, what: str, ours: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, magnitude: float
) -> None:
    """The error against float64 is at most `tolerance` times that of the same-dtype PyTorch reference.

    `magnitude` is the largest number among what is compared together (all outputs, or all gradients): a gradient that
    cancels to zero is a sum of terms of about that size.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == same.dtype
    assert not ours.isnan().any(), f"{what} holds NaN"
    # Where the exact answer is infinite (the log-sum-exp of nothing), so must ours be; subtraction would give NaN.
    assert torch.equal(ours.isinf(), exact.isinf()), f"{what} is infinite in other places"
    finite = exact.isfinite()
    error = largest([(ours.double() - exact)[finite]])
    reference_error = largest([(same.double() - exact)[finite]])
    # The reference may be exact by luck on a few elements. A difference of two rounded numbers (in attention's backward
    # pass, of one token with itself) is off by up to two units in the last place of the larger; that is no fault.
    luck = 2 * torch.finfo(ours.dtype).eps * magnitude
    assert error <= spec.tolerance * reference_error + luck, f"{what}: {error:.3g}, reference {reference_error:.3g}"


def check_numbers(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> None:
    exact, upstream, exact_gradients = run(spec.reference, spec, sample, torch.float64, None)
    upstream = [g.to(dtype) for g in upstream]
    exact, _, exact_gradients = run(spec.reference, spec, sample, torch.float64, upstream)
    same, _, same_gradients = run(spec.reference, spec, sample, dtype, upstream)
    ours, _, our_gradients = run(spec.function, spec, sample, dtype, upstream)
    magnitude = largest(exact)
    for number, triple in enumerate(zip(ours, same, exact, strict=True)):
        assert_close_to_exact(spec, f"output {number}", *triple, magnitude)
    magnitude = largest(list(exact_gradients.values()))
    for name, gradient in our_gradients.items():
        triple = (gradient, same_gradients[name], exact_gradients[name])
        assert_close_to_exact(spec, f"gradient of {name}", *triple, magnitude)


def largest(tensors: list[torch.Tensor]) -> float:
    """The largest finite absolute value in `tensors`; 0 where there is none."""
    finite = [x[x.isfinite()].abs() for x in tensors]
    return max((x.max().item() for x in finite if x.numel()), default=0.0)


@pytest.mark.parametrize(("spec", "index", "dtype"), cases((torch.float32, torch.float16)))
def test_error_against_float64_is_within_twice_that_of_pytorch(spec: OpSpec, index: int, dtype: torch.dtype) -> None:
    check_numbers(spec, sample_at(spec, index, dtype), dtype)


def forced_configurations() -> Iterator[Any]:
    for spec in SPECS:
        for kernel, table in spec.tables.items():
            for configuration in table.choices():
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


@per_spec()
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


@per_spec()
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


@per_spec()
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
        calls = recorded_calls(lambda sample=sample: run(spec.function, spec, sample, torch.float32, None))
        assert calls, "the Triton path called no registered op"
        for op, args, kwargs in calls:
            torch.library.opcheck(op, args, kwargs)


def recorded_calls(action: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The ``tilewright::`` calls that `action` makes, forward ones with inputs that ask for gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "tilewright":
                differentiable = not func._opname.endswith("backward")
                copies = tuple(
                    a.detach().clone().requires_grad_(differentiable and a.is_floating_point())
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


@per_spec()
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
    torch.manual_seed(0)
    sample = next(sample for sample in spec.samples(CPU, torch.float16) if sample.label == "three rows")
    expected, upstream, expected_gradients = run(spec.function, spec, sample, torch.float16, None)
    names = spec.differentiable(sample)
    far = {
        name: far_apart(x, tmp_path / name).requires_grad_(name in names) if name in spec.strided else x
        for name, x in sample.tensors.items()
    }
    differentiated = [name for name in names if name in spec.strided]
    got = outputs_of(spec.function(**far, **sample.options))
    gradients = torch.autograd.grad(got, [far[name] for name in differentiated], upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for name, gradient in zip(differentiated, gradients, strict=True):
        assert torch.equal(gradient, expected_gradients[name]), name
