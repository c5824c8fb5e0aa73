"""Write ``docs/kernels.md``: every op's error against float64 beside PyTorch's own, each cell from a run.

    make docs

The Triton kernels run on a GPU where there is one, else in Triton's interpreter. Two processes share the work.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tilewright.kernels.accuracy import Comparison, compare
from tilewright.kernels.dispatch import use
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter holds bfloat16 as its bits, which a matrix product there would multiply as integers.
NEEDS_A_GPU_FOR_BFLOAT16 = ("attention",)
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"

INTRODUCTION = """\
# Kernels: options, shapes and errors

Written by `make docs` from the ops' own specifications (each file's `SPEC`); do not edit by hand.

Each cell is the largest absolute error against the same computation in float64, divided by the largest exact value: of
the Triton kernel and, after the slash, of plain PyTorch in the same dtype. "Forward" is over all outputs,
"backward" over the gradients of all inputs, the one where ours is largest. The contract test
accepts at most twice PyTorch's error.

{where}

An error of 0 is an exact result, or the exact one rounded. In the column of options, names without a value are optional
tensors that the case has.
"""


def where() -> str:
    """Which machine made the table."""
    versions = f"torch {torch.__version__}"
    try:
        import triton

        versions += f", triton {triton.__version__}"
    except ImportError:
        pass
    if DEVICE.type == "cuda":
        return f"Measured on {torch.cuda.get_device_name()}, {versions}."
    return (
        f"Measured on a CPU in Triton's interpreter, {versions}: the kernels' own steps, but not a\nGPU's arithmetic. "
        "The interpreter cuts float32 off where it stores bfloat16 (a GPU rounds) and has no matrix products\n"
        "of it. PyTorch's figures are its CPU's."
    )


def shapes(spec: OpSpec, sample: Sample) -> str:
    """The tensors' shapes, as in ``weight 50 x 16``."""
    return ", ".join(f"{name} {' x '.join(map(str, x.shape)) or 'scalar'}" for name, x in sample.tensors.items())


def options(sample: Sample, required: set[str]) -> str:
    """The options that differ from the defaults, and the optional tensors that are there."""
    shown = [name for name in sample.tensors if name not in required]
    shown += [f"{name}={value}" for name, value in sample.options.items()]
    return ", ".join(shown) or "none"


def relative(comparisons: list[Comparison]) -> str:
    """Error of ours / of PyTorch, relative to the largest value, where ours is largest."""
    if not comparisons:
        return "-"
    ours, theirs = max((c.error / (c.magnitude or 1.0), c.reference_error / (c.magnitude or 1.0)) for c in comparisons)
    return f"{ours:.1e} / {theirs:.1e}".replace("0.0e+00", "0")


def cells(job: tuple[int, int]) -> list[str]:
    """Forward and backward errors of one sample of one op, for each dtype."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    spec, found = SPECS[job[0]], []
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and DEVICE.type == "cpu" and spec.name in NEEDS_A_GPU_FOR_BFLOAT16:
            found += ["needs a GPU", "needs a GPU"]
            continue
        torch.manual_seed(job[1])
        sample = list(spec.samples(DEVICE, dtype))[job[1]]
        with use("triton"):
            comparisons = list(compare(spec, sample, dtype))
        found.append(relative([c for c in comparisons if c.what.startswith("output")]))
        found.append(relative([c for c in comparisons if c.what.startswith("gradient")]))
    return found


def main() -> None:
    """Measure everything and write the page."""
    jobs, rows = [], []
    for number, spec in enumerate(SPECS):
        samples = list(spec.samples(DEVICE, torch.float32))
        required = set.intersection(*(set(sample.tensors) for sample in samples))
        for index, sample in enumerate(samples):
            if not any(x.numel() for x in sample.tensors.values() if x.is_floating_point()):
                continue
            jobs.append((number, index))
            rows.append([f"`{spec.name}`", sample.label, options(sample, required), shapes(spec, sample)])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done, (row, found) in enumerate(zip(rows, pool.map(cells, jobs), strict=True), 1):
            row.extend(found)
            print(f"\r{done}/{len(jobs)} {row[0]} {row[1]}\033[K", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    header = ["op", "case", "options", "shapes"]
    header += [f"{str(dtype)[6:]} {way}" for dtype in DTYPES for way in ("forward", "backward")]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    PAGE.write_text(INTRODUCTION.format(where=where()) + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{PAGE}: {len(rows)} cases of {len(SPECS)} ops")


if __name__ == "__main__":
    main()
