"""A linear head worked through in bounded chunks of rows: what `linear_cross_entropy`, `linear_logprob` and `linear_kl`
share.

    logits = hidden · weightᵀ + bias

The logits of one chunk of rows exist at a time. An op turns them into the rows' losses and the gradient dlogits, which
may overwrite them; from that follow

    dhidden = dlogits · weight          dweight = Σ_chunks dlogitsᵀ · hidden          dbias = Σ_rows dlogits

The matrix products run in the inputs' dtype; dweight and dbias are summed over the chunks in float32, in which a sum
over many rows is neither too large nor too small for its dtype. In bfloat16, which has float32's range, dweight is
rounded once it is complete: what waits for the backward pass is half as large. A loss that is one number computes its
gradients along with it, up to the upstream scalar, by which `scaled` multiplies them in the backward pass; so each
logit is computed once. Only the gradients that someone asks for are computed: the others are empty tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tilewright.kernels.autocast import to_lower_precision
from tilewright.kernels.checks import check_float, check_same, check_shape, check_tensors
from tilewright.kernels.dispatch import runs_triton
from tilewright.kernels.library import differentiate, refuse_double_backward, register
from tilewright.kernels.rows import accumulation_dtype


class Wanted(NamedTuple):
    """Which of a head's gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of hidden, weight and bias; empty where not wanted


def head_inputs(
    op: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hidden (…, width), weight (classes, width) and bias (classes,) as the matrix products take them: in autocast's
    dtype where it is enabled, sharded parameters made whole.

    Raises:
        ValueError: one does not fit; it is named with `prefix`.
    """
    name, weight_name, bias_name = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    check_tensors(op, **{name: hidden, weight_name: weight})
    check_float(op, **{name: hidden, weight_name: weight, bias_name: bias})
    if is_sharded(hidden):
        raise ValueError(f"{op}: {name} is a DTensor; it must be this process's own rows: {name}.to_local()")
    (lower,) = to_lower_precision(hidden)
    assert lower is not None
    lower_weight, lower_bias = to_lower_precision(whole(weight, lower.dtype), whole(bias, lower.dtype))
    assert lower_weight is not None
    if lower.ndim == 0:
        raise ValueError(f"{op}: {name} has no dimension; it must be (…, width)")
    if lower_weight.ndim != 2:
        raise ValueError(f"{op}: {weight_name} has {lower_weight.ndim} dimensions; it must be (classes, width)")
    if lower_weight.shape[0] == 0:
        raise ValueError(f"{op}: {weight_name} has no classes; it must be (classes, width), at least one")
    shape = (lower_weight.shape[0], lower.shape[-1])
    check_shape(op, weight_name, lower_weight, shape, f"(classes, the last dimension of {name})")
    check_shape(op, bias_name, lower_bias, lower_weight.shape[:1], f"one for each row of {weight_name}")
    check_same(op, name, lower, dtype=True, **{weight_name: lower_weight, bias_name: lower_bias})
    return lower, lower_weight, lower_bias


# Logits that exist at a time, as elements. On a GPU each chunk reads and writes the float32 weight gradient once, so
# that few large chunks are better; on a CPU a matrix product over few rows is slow.
_CHUNK_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 24}


def chunk_rows(classes: int, device: torch.device) -> int:
    """Rows whose logits exist at a time."""
    budget = _CHUNK_ELEMENTS.get(device.type, 1 << 24)
    return max(128, 1 << (max(budget // max(classes, 1), 1).bit_length() - 1))


def in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wants: Wanted,
    step: int,
    rows: Callable[[slice, torch.Tensor], torch.Tensor | None],
) -> Gradients:
    """Work through hidden (rows, width), `step` rows at a time.

    Args:
        rows: called with each chunk's place and its logits (chunk, classes), which it may overwrite; it returns
            dlogits, or None where no gradient is wanted.

    Returns:
        dhidden in the dtype of hidden; dweight in `_complete_dtype`; dbias in float32 (float64 for float64).
    """
    wide = accumulation_dtype(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape if wants.hidden else (0,))
    spans = _class_spans(weight) if wants.weight else []
    sums: list[torch.Tensor] = []
    dbias = weight.new_zeros(weight.shape[:1] if wants.bias else (0,), dtype=wide)

    # A function, so that what belongs to one chunk is freed before the next.
    def chunk(span: slice) -> None:
        part = hidden[span]
        dlogits = rows(span, F.linear(part, weight, bias))
        if dlogits is None:
            return
        if wants.hidden:
            dhidden[span] = dlogits @ weight
        if not sums:
            sums.extend(_product(dlogits[:, classes], part) for classes in spans)
        else:
            for classes, dweight in zip(spans, sums, strict=True):
                _add_product(dweight, dlogits[:, classes], part)
        if wants.bias:
            dbias.add_(dlogits.sum(0, dtype=wide))

    device = hidden.device.type  # meta has no autocast
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for start in range(0, hidden.shape[0], step):
            chunk(slice(start, min(start + step, hidden.shape[0])))
    if not hidden.shape[0]:
        sums = [weight.new_zeros(weight[classes].shape, dtype=wide) for classes in spans]
    return dhidden, _complete(sums, _complete_dtype(hidden.dtype), weight), dbias


# Classes whose products, rounded to 16 bits, exist at a time before they are added.
_PART_CLASSES = 2048


def _class_spans(weight: torch.Tensor) -> list[slice]:
    """The classes whose sums are a tensor of their own: all, where a product can be added as it is."""
    whole = weight.is_cuda or weight.dtype == accumulation_dtype(weight.dtype)
    step = max(weight.shape[0], 1) if whole else _PART_CLASSES
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]


def _complete_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a complete dweight: float16 has not the range for a gradient before it is multiplied by the upstream one."""
    return dtype if dtype == torch.bfloat16 else accumulation_dtype(dtype)


def _complete(sums: list[torch.Tensor], dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """All classes' sums in `dtype`; `sums` is emptied on the way, so that each is freed once it is rounded."""
    if len(sums) < 2:
        return sums.pop().to(dtype) if sums else weight.new_empty(0, dtype=dtype)
    complete = weight.new_empty(weight.shape, dtype=dtype)
    first = 0
    while sums:
        part = sums.pop(0)
        complete[first : first + part.shape[0]] = part
        first += part.shape[0]
    return complete


def _product(dlogits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """dlogitsᵀ · hidden in `accumulation_dtype`, what `_add_product` would make of zeros."""
    wide = accumulation_dtype(hidden.dtype)
    if dlogits.device.type == "cuda" and dlogits.dtype != wide:
        return torch.mm(dlogits.t(), hidden, out_dtype=wide)
    return torch.mm(dlogits.t(), hidden).to(wide)


def _add_product(dweight: torch.Tensor, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
    """dweight += dlogitsᵀ · hidden, not rounded before it is summed where the device offers that."""
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), hidden)
    elif dlogits.device.type == "cuda":
        torch.addmm(dweight, dlogits.t(), hidden, out_dtype=dweight.dtype, out=dweight)
    else:
        _add_rounded_product(dweight, dlogits, hidden)


def _launch_add_product(dweight: torch.Tensor, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
    dweight.add_(dlogits.t() @ hidden)


# An op, for a compiler that saw the sums would put them off and keep the products of all chunks for it.
_add_rounded_product = register(
    "linear_head_add_product(Tensor(a!) dweight, Tensor dlogits, Tensor hidden) -> ()",
    _launch_add_product,
    lambda dweight, dlogits, hidden: None,
)


class HeadLoss:
    """A loss over the rows of a linear head: its library ops, and how its gradients come about.

    Args:
        name: of the ops: ``tilewright::NAME`` sums over the rows, ``NAME_rows`` does not, ``NAME_rows_backward`` is
            the backward pass of the latter.
        arguments: what follows ``Tensor hidden, Tensor weight, Tensor? bias`` in their schema.
        compute: called with those arguments, then with the upstream gradient of each row (None where no gradient is
            wanted) and with a `Wanted`; returns `results` tensors (rows,) and the `Gradients`.
        results: how many numbers each row gives; the first is its loss, the others take no gradient.
    """

    def __init__(self, name: str, arguments: str, compute: Callable[..., Any], results: int = 1) -> None:
        self.compute = compute
        arguments = f"Tensor hidden, Tensor weight, Tensor? bias, {arguments}"
        wants = "bool hidden_wanted, bool weight_wanted, bool bias_wanted"
        numbers, gradients = ", ".join(["Tensor"] * results), "Tensor, Tensor, Tensor"

        def fake_total(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
            wide = accumulation_dtype(hidden.dtype)
            totals = (hidden.new_empty((), dtype=wide) for _ in range(results))
            return *totals, *_fake_gradients(hidden, weight, Wanted(*rest[-3:]), _complete_dtype(hidden.dtype), wide)

        def fake_rows(hidden: torch.Tensor, *_: Any) -> Any:
            wide = accumulation_dtype(hidden.dtype)
            return _unpacked(tuple(hidden.new_empty(hidden.shape[:1], dtype=wide) for _ in range(results)))

        def fake_rows_backward(upstream: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
            return _fake_gradients(hidden, weight, Wanted(*rest[-3:]), hidden.dtype, hidden.dtype)

        self._total = register(f"{name}({arguments}, {wants}) -> ({numbers}, {gradients})", self._sums, fake_total)
        self._rows = register(f"{name}_rows({arguments}) -> ({numbers})", self._losses, fake_rows)
        self._rows_backward = register(
            f"{name}_rows_backward(Tensor upstream, {arguments}, {wants}) -> ({gradients})",
            self._rows_gradients,
            fake_rows_backward,
        )
        differentiate(self._total, _total_gradients, _keep_gradients)
        differentiate(self._rows, self._differentiate_rows, _keep_inputs)
        refuse_double_backward(self._rows_backward)

    def total(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any, opaque: bool = False
    ) -> Any:
        """The sum over the rows of each result, whose gradients are computed along with it; `opaque` where a compiler
        cannot see through the computation."""
        arguments = (hidden, weight, bias, *rest, *_wanted(hidden, weight, bias))
        if torch.compiler.is_compiling() and not opaque and _traceable(hidden, weight):
            return _Traced.apply(self._sums, *arguments)
        return self._total(*arguments)[:-3]

    def rows(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Any:
        """Each result for each row (rows,). The backward pass, which alone knows each row's upstream gradient,
        computes the logits again."""
        return _packed(self._rows(hidden, weight, bias, *rest))

    def _sums(self, hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        wants = Wanted(*rest[-3:])
        upstream = None
        if any(wants):
            upstream = hidden.new_ones((), dtype=accumulation_dtype(hidden.dtype)).expand(hidden.shape[0])
        results, gradients = self.compute(hidden, *rest[:-3], upstream, wants)
        return *(result.sum() for result in results), *gradients

    def _losses(self, *arguments: Any) -> Any:
        results, _ = self.compute(*arguments, None, Wanted(False, False, False))
        return _unpacked(results)

    def _rows_gradients(self, upstream: torch.Tensor, hidden: torch.Tensor, *rest: Any) -> Gradients:
        _, (dhidden, dweight, dbias) = self.compute(hidden, *rest[:-3], upstream, Wanted(*rest[-3:]))
        return dhidden, dweight.to(hidden.dtype), dbias.to(hidden.dtype)

    def _differentiate_rows(self, ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.arguments)
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if is_tensor else x for is_tensor, x in ctx.arguments]
        wants = Wanted(*ctx.needs_input_grad[:3])
        gradients = self._rows_backward(upstream, *arguments, *wants)
        return *_where_wanted(wants, gradients), *(None for _ in arguments[3:])


# Chunks up to which a compiler is shown the loop over them.
_TRACED_CHUNKS = 64


def _traceable(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the compiler is to see what one op would hide from it: plain PyTorch, which it fuses, and a number of
    chunks that is known and that it can bear."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a slow import, there once something compiles

    if runs_triton(hidden) or not has_static_value(hidden.shape[0]):
        return False
    return hidden.shape[0] <= _TRACED_CHUNKS * chunk_rows(weight.shape[0], hidden.device)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.wants = Wanted(*inputs[-3:])
    ctx.others = len(inputs) - 3
    ctx.set_materialize_grads(False)  # of the outputs without one: zeros of the weight's size
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])


def _total_gradients(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if upstream is None:  # whoever used the loss has passed no gradient on
        return tuple(None for _ in range(3 + ctx.others))
    return *_where_wanted(ctx.wants, _scaled(upstream, *ctx.saved_tensors)), *(None for _ in range(ctx.others))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = [(True, None) if isinstance(x, torch.Tensor) else (False, x) for x in inputs]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*_packed(output)[1:])
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))


class _Traced(torch.autograd.Function):
    """A total whose chunks ``torch.compile`` sees one by one."""

    @staticmethod
    def forward(ctx: Any, sums: Callable[..., Any], *arguments: Any) -> Any:
        output = sums(*arguments)
        ctx.wants = Wanted(*arguments[-3:])
        ctx.others = len(arguments) - 3
        ctx.mark_non_differentiable(*output[1:-3])
        ctx.save_for_backward(*output[-3:])
        return output[:-3]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        dtype = ctx.saved_tensors[0].dtype
        gradients = tuple((gradient * upstream.reshape(1)).to(dtype) for gradient in ctx.saved_tensors)
        return None, *_where_wanted(ctx.wants, gradients), *(None for _ in range(ctx.others))


def _launch_scaled(upstream: torch.Tensor, dhidden: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor) -> Any:
    # One dimension makes the factor count in type promotion: as a scalar it would be rounded to float16, where a loss
    # scale is infinite. Not in place: a second backward pass must find the gradients as they were.
    factor = upstream.reshape(1)
    return tuple(_multiplied(gradient, factor, dhidden.dtype) for gradient in (dhidden, dweight, dbias))


def _multiplied(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x · factor in `dtype`; on a CPU in parts, where PyTorch makes a copy of the whole before it rounds."""
    product = torch.empty_like(x, dtype=dtype)
    rows = x.shape[0] if x.is_cuda else _PART_CLASSES
    for start in range(0, x.shape[0], max(rows, 1)):
        part = slice(start, start + rows)
        torch.mul(x[part], factor, out=product[part])
    return product


_scaled = register(
    "linear_head_backward(Tensor upstream, Tensor dhidden, Tensor dweight, Tensor dbias) -> (Tensor, Tensor, Tensor)",
    _launch_scaled,
    lambda upstream, dhidden, dweight, dbias: tuple(
        torch.empty_like(gradient, dtype=dhidden.dtype) for gradient in (dhidden, dweight, dbias)
    ),
)
refuse_double_backward(_scaled)


# An op with one result returns it bare.
def _unpacked(results: tuple[torch.Tensor, ...]) -> Any:
    return results if len(results) > 1 else results[0]


def _packed(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _where_wanted(wants: Wanted, gradients: Any) -> tuple[torch.Tensor | None, ...]:
    return tuple(gradient if want else None for want, gradient in zip(wants, gradients, strict=True))


def _wanted(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Wanted:
    """The gradients that autograd will ask for: none of a frozen head, for instance."""
    enabled = torch.is_grad_enabled()
    return Wanted(
        enabled and hidden.requires_grad,
        enabled and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )


def _fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, wants: Wanted, weight_dtype: torch.dtype, bias_dtype: torch.dtype
) -> Gradients:
    return (
        hidden.new_empty(hidden.shape if wants.hidden else (0,)),
        weight.new_empty(weight.shape if wants.weight else (0,), dtype=weight_dtype),
        weight.new_empty(weight.shape[:1] if wants.bias else (0,), dtype=bias_dtype),
    )


def mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """total ÷ count; over no rows NaN with a gradient of zero, as in PyTorch.

    Divided here, on the outside: gradients rounded to float16 after a division by many rows would lose what loss
    scaling saves.
    """
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))


def is_sharded(x: torch.Tensor | None) -> bool:
    """Whether `x` is a ``DTensor``; told by its name, as to import the class takes longer than to import torch.nn."""
    return type(x).__name__ == "DTensor"


def whole(parameter: Any, dtype: torch.dtype) -> Any:
    """A parameter that ``fully_shard`` has sharded, gathered in `dtype`; any other, or None, as it is.

    FSDP gathers a parameter around the forward of its own module only. A head whose weight is passed to a loss
    elsewhere, tied to an embedding for instance, stands sharded. Its gradient comes back as FSDP makes it: reduced in
    float32 to the mean over all processes of the parameter's mesh, each with rows of its own, and sharded again.
    """
    return _Whole.apply(parameter, dtype) if is_sharded(parameter) else parameter


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Any, dtype: torch.dtype) -> torch.Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = parameter.device_mesh, parameter.placements, parameter.dtype
        gathered: torch.Tensor = parameter.to(dtype).full_tensor()
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, None]:
        from torch.distributed.tensor import DTensor, Partial

        # A sum of shares, not an average: gloo has no average.
        share = gradient.to(accumulation_dtype(gradient.dtype)) / ctx.mesh.size()
        summands = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return summands.redistribute(ctx.mesh, ctx.placements).to(ctx.dtype), None
