"""What holds for every kernel test: Triton kernels, in the interpreter, on poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from tilewright.kernels.dispatch import use


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    with use("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors start as NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
