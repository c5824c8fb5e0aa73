"""What the training steps' own columns mean, written into the record beside the others."""

from __future__ import annotations

from typing import Any

import pytest

DEFINITIONS = {
    "training step": "forward and backward over all micro-batches, clipping and the optimizer, as `tilewright train` "
    "takes it, on random ids at learning rate 0, so that every step is the same step; `median_seconds` is of one step",
    "training step: provider": "ours: the blocks and the loss eager; ours compiled: through torch.compile, as the "
    "trainer runs them by default",
    "training step: checkpointing": "the mode of activation checkpointing, as recipes name it",
    "tokens_per_second": "tokens of a step over all processes ÷ median_seconds",
    "training step: flops_per_second": "required FLOPs of a step (ModelConfig.flops_per_token) ÷ median_seconds; what "
    "checkpointing computes again is not counted",
    "training step: mfu": "flops_per_second ÷ the matmul peak, measured by all the step's processes at the same time; "
    "null, never guessed, where it is unknown; share_of_measured_peak is the same",
    "training step: peak_memory_bytes": "of a process: weights and optimizer state, and what a step allocates besides, "
    "at most at once; the mean over the processes",
    "training step: algorithm_memory_bytes": "of a process: float32 weights, gradients and AdamW's two moments; no "
    "activations",
    "training step: compile_seconds": "the first step less median_seconds, with nothing in Inductor's caches; what is "
    "done once at a first step is in it",
}


@pytest.hookimpl(trylast=True)  # after the record itself is there
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    if "tilewright_record" in output_json:
        output_json["tilewright_record"]["definitions"] |= DEFINITIONS
