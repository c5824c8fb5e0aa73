"""What every op issues at the small size of its audit samples, beside what it cannot do without.

``main`` runs in a process of its own with ``TRITON_INTERPRET=1`` and prints one JSON object a line: ``total``, how many
samples are to be run; then one ``traffic`` for each, the list of its passes; or an ``error``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tilewright.benchmarks.audit.counting import TorchProduct, counting
from tilewright.benchmarks.audit.issue import Issued
from tilewright.kernels.accuracy import outputs_of
from tilewright.kernels.dispatch import INTERPRETED, use
from tilewright.kernels.launch import as_if_on
from tilewright.kernels.opspec import OpSpec, Passes, Sample, Work
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError

Row = dict[str, Any]

_NOT_COUNTED = "its matrix products are PyTorch's, and so are the passes between them; nothing is counted"
_ONE_READ = "one read of the inputs serves both passes; see the pass `both`"
_CACHED = "blocks are read again by other programs, mostly from the L2 cache"


def main() -> None:
    """Print the traffic of the ops and chips that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="all where none is named")
    parser.add_argument("--chips", default="80,90", help="generations, such as 80,90,100")
    arguments = parser.parse_args()
    chips = [int(chip) for chip in arguments.chips.split(",")]
    specs = [spec for spec in SPECS if not arguments.ops or spec.name in arguments.ops]
    for finding in findings(specs, chips):
        print(json.dumps(finding), flush=True)


def findings(specs: Iterable[OpSpec], chips: Iterable[int]) -> Iterator[Row]:
    """The total, then each sample's traffic on each chip.

    Raises:
        TrainingError: the process does not interpret kernels, so there is nothing to count.
    """
    if not INTERPRETED:
        raise TrainingError("bytes are counted in Triton's interpreter; set TRITON_INTERPRET=1 before Python starts")
    # bfloat16, as what is compiled: nothing is computed, so that the interpreter lacks its arithmetic does not matter.
    work = [
        (spec, sample, chip) for spec in specs for sample in spec.audit_samples(torch.bfloat16, True) for chip in chips
    ]
    yield {"total": len(work)}
    with counting() as issued, use("triton"):
        for spec, sample, chip in work:
            where = {"op": spec.name, "sample": sample.label, "chip": chip}
            try:
                yield {"traffic": [{**where, **row} for row in traffic(spec, sample, chip, issued)]}
            except Exception as error:  # a finding about this op; the others go on
                yield {"error": {**where, "message": " ".join(f"{type(error).__name__}: {error}".split())[:500]}}


def traffic(spec: OpSpec, sample: Sample, chip: int, issued: Issued) -> list[Row]:
    """The passes of one call, as one processor of the chip sees them: issued, required and the ratios.

    Args:
        spec: the op.
        sample: one of its small audit samples.
        chip: compute capability × 10, whose launch tables hold.
        issued: what `counting` gave.
    """
    issued.taken()
    passes = spec.work(sample)
    try:
        with as_if_on(chip, processors=1):
            forward, backward = _run(spec, sample, issued)
    except TorchProduct:
        rows = [_uncounted(name, work) for name, work in _named(passes, bool(spec.differentiable(sample)))]
    else:
        # Of an op of matrix products, the operations of one of them.
        forward_products = sum(spec.matmuls.get(kernel, 0) for kernel in forward.kernels)
        product = passes.forward.flops // forward_products if forward_products else None
        rows = [_row(spec, "forward", forward, passes, product)]
        if backward is not None:
            both = Issued(
                kernels=forward.kernels + backward.kernels, kernel_bytes=forward.kernel_bytes + backward.kernel_bytes
            )
            both.add(forward.counts)
            both.add(backward.counts)
            rows.append(_row(spec, "backward", backward, passes, product))
            rows.append(_row(spec, "both", both, passes, product))
    width = next(iter(sample.tensors.values())).shape[-1]
    return [{"width": width, **row} for row in rows]


def _named(passes: Passes, with_gradient: bool) -> list[tuple[str, Work]]:
    named = [("forward", passes.forward), ("backward", passes.backward), ("both", passes.both)]
    return named if with_gradient else named[:1]


def _run(spec: OpSpec, sample: Sample, issued: Issued) -> tuple[Issued, Issued | None]:
    """What the forward pass issues, with gradients asked for, and what the backward pass does."""
    names = spec.differentiable(sample)
    tensors = {name: x.detach().requires_grad_(name in names) for name, x in sample.tensors.items()}
    results = [r for r in outputs_of(spec.function(**tensors, **sample.options)) if r.requires_grad]
    forward = issued.taken()
    if not names:
        return forward, None
    upstream = [torch.empty_like(r) for r in results]
    torch.autograd.grad(results, [tensors[name] for name in names], upstream)
    return forward, issued.taken()


def _row(spec: OpSpec, name: str, issued: Issued, passes: Passes, product: int | None) -> Row:
    work: Work = getattr(passes, name)
    flops, required, note = issued.element_flops, work.flops, None
    if (
        product is not None
    ):  # against the products of the pass's own kernels: a backward pass computes some of them twice
        required = sum(spec.matmuls.get(kernel, 0) for kernel in issued.kernels) * product
        flops, note = issued.product_flops, _CACHED
    separable = name == "both" or passes.common.bytes == 0
    if separable:
        for what, found, needed in (("bytes", issued.bytes, work.bytes), ("operations", flops, required)):
            if found < needed:
                raise TrainingError(
                    f"{spec.name}, {name}: the kernels issue {found:,} {what}, fewer than the {needed:,} that the op's "
                    "`work` calls the least; mend one of the two"
                )
    return {
        "pass": name,
        "bytes_issued": issued.bytes,
        "kernel_bytes": dict(issued.kernel_bytes),
        "bytes_compulsory": work.bytes,
        "byte_ratio": issued.bytes / work.bytes if separable and work.bytes else None,
        "flops_issued": flops,
        "flops_required": required,
        "flop_ratio": flops / required if separable and required else None,
        "note": note if separable else _ONE_READ,
    }


def _uncounted(name: str, work: Work) -> Row:
    return {
        "pass": name,
        "bytes_issued": None,
        "kernel_bytes": {},
        "bytes_compulsory": work.bytes,
        "byte_ratio": None,
        "flops_issued": None,
        "flops_required": work.flops,
        "flop_ratio": None,
        "note": _NOT_COUNTED,
    }
