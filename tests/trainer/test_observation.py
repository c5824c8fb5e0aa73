"""The figures that each step of a run records of its speed and memory."""

import io
from itertools import accumulate

import pytest
from rich.console import Console

from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics


def recorded(recipe):
    loaded = load_recipe(str(recipe))
    run = train(loaded, Console(file=io.StringIO())).run
    return loaded, read_metrics(run / "metrics.jsonl")[0]


def test_hardware_flops_count_what_checkpointing_computes_again_and_memory_what_is_there(tiny_recipe):
    recipe, lines = recorded(tiny_recipe(activation_checkpointing={"mode": "full"}, optimizer__ema_decay=0.9))
    model = recipe.model
    # Without attention: qkv, out and gate_up of each block, once more forward; down is not needed again.
    products = model.hidden_size * (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    products += 2 * model.hidden_size * model.intermediate_size
    again = model.layers * (2 * products + 4 * model.heads * model.head_dim * 32)
    required = model.flops_per_token(32)
    for line in lines:
        assert line["hfu"] / line["mfu"] == pytest.approx((required + again) / required)
    first, *others = lines
    held = {kind: first["memory"][kind] for kind in ("parameters", "optimizer", "average")}
    assert held["optimizer"] == pytest.approx(held["parameters"], rel=0.01)
    assert held["average"] == held["parameters"]
    assert first["memory"]["activations"] is None
    for line in others:
        assert {kind: line["memory"][kind] for kind in held} == held
        assert line["memory"]["gradients"] >= held["parameters"]
    # Two rows of 32 tokens of width 32 in float32 for each block, at least.
    known = [line["memory"]["activations"] for line in others if not line["checkpoint_in_flight"]]
    assert all(size is not None and size >= 2 * 2 * 32 * 32 * 4 for size in known)


def test_the_throughput_since_the_start_counts_more_than_the_steps_also_over_a_resumption(tiny_recipe, tmp_path):
    where = {"run_directory": str(tmp_path / "here")}
    recorded(tiny_recipe(steps=2, **where))
    _, lines = recorded(tiny_recipe(steps=4, **where))
    in_steps = accumulate(8 * 32 / line["tokens_per_second"] for line in lines)
    since_start = [line["tokens"] / line["tokens_per_second_since_start"] for line in lines]
    assert all(wall > steps for wall, steps in zip(since_start, in_steps, strict=True))
    assert since_start == sorted(since_start)
