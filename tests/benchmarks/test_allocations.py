"""Memory is counted block by block: temporaries, what is saved, what is freed, and nothing that is only mapped."""

import pytest
import torch
import torch.nn.functional as F

from tilewright.benchmarks.allocations import peak_bytes, peaks

CPU = torch.device("cpu")


def test_the_product_is_alive_while_its_relu_is_made() -> None:
    x, y = torch.randn(64, 32), torch.randn(32, 48)
    assert peak_bytes(lambda: (x @ y).relu(), CPU) == 2 * 64 * 48 * 4
    assert peak_bytes(lambda: (x @ y).relu_(), CPU) == 64 * 48 * 4


def test_temporaries_within_an_operation_count() -> None:
    logits, targets = torch.randn(64, 1000), torch.zeros(64, dtype=torch.long)
    # cross_entropy is one call, and makes the logarithm of every probability within.
    counted = peak_bytes(lambda: F.cross_entropy(logits, targets), CPU)
    assert logits.nbytes <= counted < logits.nbytes + 1000


def test_what_is_freed_before_the_next_allocation_is_counted_once() -> None:
    def two_in_turn() -> None:
        torch.empty(1000)
        torch.empty(1000)

    assert peak_bytes(two_in_turn, CPU) == 4000


def test_memory_that_is_never_touched_counts_and_what_was_there_before_does_not() -> None:
    before = torch.empty(10_000)
    assert peak_bytes(lambda: torch.empty(250_000).size(), CPU) == 1_000_000
    assert peak_bytes(lambda: before[1:].view(-1), CPU) == 0


def test_what_the_forward_pass_saves_counts_for_the_backward_pass() -> None:
    x = torch.randn(100, 100, requires_grad=True)
    upstream = torch.randn(100, 100)
    results: list[torch.Tensor] = []

    def forward() -> None:
        results.append(x.exp().sin())  # exp saves its output; sin its input, which is the same

    def backward() -> None:
        torch.autograd.grad(results.pop(), x, upstream)

    one = x.nbytes
    ahead, back = peaks(forward, backward, device=CPU)
    assert ahead == 2 * one
    # exp's and sin's outputs, cos within sin's backward pass, and the product with upstream.
    assert back == 4 * one


def test_a_call_that_raises_leaves_the_terminal_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    def fails() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError):
        peak_bytes(fails, CPU)
    os.write(2, b"still heard\n")
    assert capfd.readouterr().err == "still heard\n"


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device is meta"):
        peak_bytes(lambda: None, torch.device("meta"))
