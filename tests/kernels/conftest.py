"""What holds for every kernel test: Triton kernels, in the interpreter, on poisoned memory."""

from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture
def issued(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Asks for the bytes that kernels have loaded and stored since it was last asked, counted in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    total = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        nonlocal total
        total += int(mask.data.sum()) * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def since_last_asked() -> int:
        nonlocal total
        counted, total = total, 0
        return counted

    # Unmasked loads and stores go through the masked ones.
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return since_last_asked
