"""What another library has in place of an op of ours, as an `OpSpec` that the same instruments read."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewright.kernels.opspec import OpSpec, Passes, Sample
from tilewright.kernels.registry import SPECS
from tilewright.trainer.errors import TrainingError

# The libraries by their names on PyPI, and the version whose faces the counterparts were written for.
PEERS = {"liger-kernel": "0.8.5", "flash-linear-attention": "0.6.0"}
_MODULES = {"liger-kernel": "liger", "flash-linear-attention": "fla"}


@dataclass(frozen=True)
class Counterpart:
    """A library's function for one of our ops.

    Attributes:
        op: our op's name.
        function: called as ours is, with the same tensors and options by the same names.
        covers: whether it computes what a sample of ours asks for.
        prepare: what the library wants done to the tensors before, outside what is counted.
    """

    op: str
    function: Callable[..., Any]
    covers: Callable[[Sample], bool] = lambda sample: True
    prepare: Callable[[Sample], Sample] = lambda sample: sample

    def spec(self, matmuls: Mapping[str, int]) -> OpSpec:
        """Our op's `OpSpec` with the library's function, on those of our samples that it covers.

        Args:
            matmuls: the matrix products of the library's kernels, as `OpSpec.matmuls`.
        """
        ours = next(spec for spec in SPECS if spec.name == self.op)
        work: dict[str, Passes] = {}

        def audit_samples(dtype: torch.dtype, small: bool) -> Iterator[Sample]:
            for sample in filter(self.covers, ours.audit_samples(dtype, small)):
                work[sample.label] = ours.work(sample)
                yield self.prepare(sample)

        return replace(
            ours,
            function=self.function,
            audit_samples=audit_samples,
            work=lambda sample: work[sample.label],  # what is required is the same, however the tensors were prepared
            matmuls=matmuls,
        )


def version_of(peer: str) -> str:
    """The installed version of a library.

    Raises:
        TrainingError: it is no peer, or not installed.
    """
    if peer not in PEERS:
        raise TrainingError(f"there is no comparison with {peer!r}; --against takes {' or '.join(PEERS)}")
    try:
        return importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        raise TrainingError(f"{peer} is not installed: pip install {peer}=={PEERS[peer]}") from None


def specs_of(peer: str, names: Collection[str] = ()) -> tuple[OpSpec, ...]:
    """The counterparts of our ops (all, or those named) in a library, which is imported here.

    Raises:
        TrainingError: the library is not installed, or has not the functions that are compared.
    """
    version = version_of(peer)
    try:
        found: tuple[Counterpart, ...] = _module(peer).counterparts()
    except (ImportError, AttributeError) as error:
        raise TrainingError(
            f"{peer} {version} lacks what the comparison needs ({error}): pip install {peer}=={PEERS[peer]}"
        ) from None
    products = matmuls_of(peer)
    return tuple(each.spec(products.get(each.op, {})) for each in found if not names or each.op in names)


def matmuls_of(peer: str) -> Mapping[str, Mapping[str, int]]:
    """By op, the matrix products of the library's kernels; ``"_forward"`` stands for its forward pass."""
    matmuls: Mapping[str, Mapping[str, int]] = _module(peer).MATMULS
    return matmuls


def _module(peer: str) -> Any:
    return importlib.import_module(f"{__package__}.{_MODULES[peer]}")


def contiguous(sample: Sample, *names: str) -> Sample:
    """The sample with the named tensors as one run of memory each, and their values undefined."""
    dense = {name: torch.empty(sample.tensors[name].shape, dtype=sample.tensors[name].dtype) for name in names}
    return replace(sample, tensors={**sample.tensors, **dense})
