"""What a comparison with other trainers or losses refuses before it measures, and that it judges something."""

import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as functional
from rich.console import Console

from tilewright.benchmarks.compare import compare, linear_cross_entropy


def started(module, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["x", *options])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(SystemExit) as left:
        module.main()
    return left.value.code


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "4"], "--rounds is 4, of which no interval can be made; at least 5"),
        (["--short-steps", "3"], "--short-steps is 3 and --steps 30; the first 3 of a round"),
        (["--steps", "10"], "--short-steps is 12 and --steps 10"),
    ],
)
def test_a_comparison_of_trainers_refuses_at_once_what_it_cannot_judge(monkeypatch, capsys, options, sentence):
    assert started(compare, monkeypatch, *options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rounds", "4"], "of which no interval can be made"),
        (["--dtypes", "nope"], "invalid choice: 'nope'"),
        (["--classes", "0"], "--classes is 0; at least 2"),
    ],
)
def test_a_comparison_of_losses_refuses_at_once_what_it_cannot_judge(monkeypatch, capsys, options, sentence):
    assert started(linear_cross_entropy, monkeypatch, *options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["loss", "hidden", "weight"])
def test_a_loss_that_computes_something_else_is_not_timed(monkeypatch, wrong):
    def doubled(hidden, weight, targets):
        factor = 2.0 if wrong == "loss" else 1.0
        changed = {"hidden": hidden, "weight": weight}
        if wrong in changed:
            changed[wrong] = 2 * changed[wrong] - changed[wrong].detach()  # the same value, twice the gradient
        return factor * functional.linear_cross_entropy(changed["hidden"], changed["weight"], targets)

    monkeypatch.setattr(linear_cross_entropy, "TOKENS", 256)
    monkeypatch.setattr(linear_cross_entropy, "WIDTH", 16)
    monkeypatch.setitem(linear_cross_entropy.PROVIDERS, linear_cross_entropy.OURS, doubled)
    monkeypatch.setattr(linear_cross_entropy, "interleaved", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match=f"{wrong}.* of tilewright is off by"):
        linear_cross_entropy.compare(64, torch.float32, 5, Console())


def runs(**tokens_per_second):
    return {
        name.replace("_", " "): compare.Runs(rates, [1_000_000_000] * len(rates), [1.0] * len(rates), [2.0, 1.0])
        for name, rates in tokens_per_second.items()
    }


def test_five_rounds_make_a_table():
    table = compare.table(runs(tilewright=[1.0, 2.0, 3.0, 4.0, 5.0], peer=[1.0] * 5), [2.0, 1.25])
    assert table.columns[1].header == "tokens/s (93.8%)"
    assert list(table.columns[-1].cells) == ["-20.00%", "-20.00%"]


@pytest.mark.parametrize(("last", "held"), [(1.0, True), (1.009, True), (1.02, False), (0.98, False)])
def test_the_loss_is_held_to_that_of_float32(last, held):
    verdicts = compare.judge(runs(tilewright=[2.0] * 5, peer=[1.0] * 5), [2.0, last])
    assert [holds for holds, _ in verdicts] == [True, False, held]  # the memory is the peer's


def test_what_judges_no_bar_does_not_hold(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "prepare", lambda *_: None)
    monkeypatch.setattr(compare, "environment", lambda _: {})

    def run_once(run, *_):
        run.tokens_per_second.append(1.0)
        run.peak_rss_bytes.append(1)
        run.first_step_seconds.append(1.0)
        run.losses = [2.0, 1.0]

    monkeypatch.setattr(compare, "run_once", run_once)
    asked = Namespace(
        shape="42M", rounds=5, steps=30, short_steps=12, only=[compare.OURS], json=tmp_path / "compare.json"
    )
    assert compare.compare(asked, Console(width=200)) == 1
    assert "no bar was judged: that takes tilewright and a peer" in capsys.readouterr().out
