"""At which shapes an op is timed and checked: the audit's, which each op declares, filled with random numbers.

On a GPU they are those of real models; on a CPU rows of the same width, as many as one processor of a GPU would get.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch

from tilewright.benchmarks.peaks import name_of
from tilewright.kernels.opspec import OpSpec, Sample
from tilewright.kernels.registry import SPECS

# Two ops whose processor's share is too little to time on a CPU: so many times the rows.
_MORE_ROWS = {"adamw": 64, "cross_entropy": 16}
# The audit narrows the matrix products that are PyTorch's own. Width by the sample's first word, for a GPU.
_WIDTHS = {"125M": 768, "8B": 4096, "262,144": 2304}
_GPU_TOKENS, _GPU_WIDTH, _CPU_TOKENS, _CPU_WIDTH = 8192, 4096, 64, 128
# Attention is compared with float64 on so many tokens of a sequence, where whole rows of scores are held.
_CHECKED_TOKENS = 2048
_QUICK = ("1B 2k",)


class Case(NamedTuple):
    """An op at one shape in one dtype."""

    spec: OpSpec
    label: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.spec.name} {self.label} {name_of(self.dtype)}"

    def timed(self, device: torch.device) -> Sample:
        """The call that is timed on `device`: shapes alone, in CPU memory that is not touched."""
        small = device.type == "cpu"
        sample = self._declared(small)
        if "hidden" in sample.tensors:
            width = _WIDTHS.get(self.label.split(maxsplit=1)[0].strip(","), _GPU_WIDTH)
            return _resized(sample, *((_CPU_TOKENS, _CPU_WIDTH) if small else (_GPU_TOKENS, width)))
        return _with_rows(sample, _MORE_ROWS.get(self.spec.name, 1)) if small else sample

    def checked(self, device: torch.device) -> Sample:
        """The call that is compared with float64: the timed one, or so much of it as float64 has room for."""
        timed = self.timed(device)
        if {"q", "k", "v"} <= set(timed.tensors):
            return _one_head(timed)
        if device.type == "cpu":
            return timed
        return _resized(timed, _CPU_TOKENS, _CPU_WIDTH) if "hidden" in timed.tensors else self._declared(small=True)

    def _declared(self, small: bool) -> Sample:
        for sample in self.spec.audit_samples(self.dtype, small):
            if sample.label == self.label:
                return sample
        raise ValueError(f"{self}: {self.spec.name} has no such sample at this size")


def cases(device: torch.device, dtypes: tuple[torch.dtype, ...], *, quick: bool) -> Iterator[Case]:
    """Every op at its shapes in `dtypes`; one shape of each where `quick`."""
    for spec in SPECS:
        for dtype in dtypes:
            labels = _labels(spec, dtype, small=device.type == "cpu")
            chosen = [label for label in labels if label in _QUICK][:1] or labels[:1]
            yield from (Case(spec, label, dtype) for label in (chosen if quick else labels))


def _labels(spec: OpSpec, dtype: torch.dtype, small: bool) -> list[str]:
    """What is worth timing: each label once, and of batches that differ in how tokens are divided alone, the first."""
    labels: dict[Hashable, str] = {}
    for sample in spec.audit_samples(dtype, small):
        first = next(x for x in sample.tensors.values() if x.is_floating_point())
        # An optimizer's samples mix dtypes: that of its parameters counts. In float64, which results are compared
        # with, there are no low bits.
        if first.dtype != dtype or "low_bits" in sample.tensors:
            continue
        sizes = tuple((name, x.numel(), x.dtype, x.is_contiguous()) for name, x in sample.tensors.items())
        same = (sizes, spec.work(sample), tuple(sample.options.items()))
        if sample.label not in labels.values():
            labels.setdefault(same, sample.label)
    return list(labels.values())


def drawn(sample: Sample, device: torch.device, generator: torch.Generator) -> Sample:
    """The sample with fresh random numbers on `device`, strides as they were; of the dtypes that it has."""
    tensors = {}
    for name, x in sample.tensors.items():
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        _DRAWN.get(name, _normal)(y, sample, generator)
        if name.endswith("weight") and x.ndim == 2:  # of a head, whose logits are then about 1
            y.mul_(x.shape[-1] ** -0.5)
        tensors[name] = y
    return dataclasses.replace(sample, tensors=tensors)


_Draw = Callable[[torch.Tensor, Sample, torch.Generator], object]


def _normal(y: torch.Tensor, sample: Sample, generator: torch.Generator) -> None:
    y.normal_(generator=generator)


def _targets(y: torch.Tensor, sample: Sample, generator: torch.Generator) -> None:
    classes = sample.tensors["weight"].shape[0] if "weight" in sample.tensors else sample.tensors["logits"].shape[-1]
    y.random_(0, classes, generator=generator)


# Tensors that are not normal numbers, by name.
_DRAWN: dict[str, _Draw] = {
    "targets": _targets,
    "positions": lambda y, sample, generator: y.random_(0, sample.tensors["cos"].shape[0], generator=generator),
    "cu_seqlens": lambda y, sample, generator: y.copy_(sample.tensors["cu_seqlens"]),
    "cos": lambda y, sample, generator: y.uniform_(0, 2 * math.pi, generator=generator).cos_(),
    "sin": lambda y, sample, generator: y.uniform_(0, 2 * math.pi, generator=generator).sin_(),
    "exp_avg_sq": lambda y, sample, generator: y.uniform_(0, 1e-2, generator=generator),
}


def _with_rows(sample: Sample, times: int) -> Sample:
    """So many times the rows."""
    tensors = {
        name: x.new_empty(times * x.shape[0], *x.shape[1:]) if x.is_floating_point() else x.repeat(times)
        for name, x in sample.tensors.items()
    }
    return dataclasses.replace(sample, tensors=tensors) if times > 1 else sample


def _resized(sample: Sample, tokens: int, width: int) -> Sample:
    """A head's call with other tokens and another width, the same classes."""
    tensors = {}
    for name, x in sample.tensors.items():
        if name.endswith("hidden"):
            tensors[name] = x.new_empty(tokens, width)
        elif name.endswith("weight"):
            tensors[name] = x.new_empty(x.shape[0], width)
        else:
            tensors[name] = x.new_empty(tokens)
    return dataclasses.replace(sample, tensors=tensors)


def _one_head(sample: Sample) -> Sample:
    """Attention of the first sequence's first key-value head and the queries that share it."""
    q, k, v = (sample.tensors[name] for name in "qkv")
    group = q.shape[-2] // k.shape[-2]
    cut = {"q": q[..., :group, :], "k": k[..., :1, :], "v": v[..., :1, :]}
    if "cu_seqlens" not in sample.tensors:
        cut = {name: x[:1, :_CHECKED_TOKENS] for name, x in cut.items()}
    if "sinks" in sample.tensors:
        cut["sinks"] = sample.tensors["sinks"][:group]
    return dataclasses.replace(sample, tensors={**sample.tensors, **cut})
