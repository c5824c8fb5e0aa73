"""Stopping by the held-out loss: the rule on records, and whole runs that stop, also after being killed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tilewright.trainer import TrainingError, loop
from tilewright.trainer.health.early_stopping import no_longer_improves
from tilewright.trainer.recipe import Evaluation
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics

from .conftest import Write, run, torchrun

pytestmark = pytest.mark.usefixtures("without_what_takes_long")


def stops_at(losses: list[float | None], margin: float = 0.0, tokens: list[int] | None = None) -> list[int]:
    """After which evaluations, from 0, a run with `stop_after` 2 would stop."""
    counts = tokens or [7] * len(losses)
    record = [{"eval": {"heldout": {"loss": loss, "tokens": n}}} for loss, n in zip(losses, counts, strict=True)]
    recipe = Evaluation(every=1, stop_after=2, stop_margin=margin)
    return [n for n in range(len(losses)) if no_longer_improves(record[: n + 1], "heldout", recipe)]


@pytest.mark.parametrize(
    ("losses", "margin", "stops"),
    [
        ([4, 3, 2, 1], 0.0, []),
        ([4, 3, 3.5, 3.2], 0.0, [3]),
        ([4, 3, 3.5, 2.9, 3.0], 0.0, []),
        ([4, 3, 3, 3], 0.0, [3]),  # as good is no better
        ([4, 3.95, 3.92, 3.8], 0.1, [2]),  # 3.8 is better than 4, from which the margin counts
        ([4, None, None], 0.0, [2]),
        ([None, None, 4], 0.0, [1]),
    ],
)
def test_it_stops_after_so_many_evaluations_without_a_better_one(
    losses: list[float | None], margin: float, stops: list[int]
) -> None:
    assert stops_at(losses, margin) == stops


def test_losses_are_compared_over_the_same_text_alone() -> None:
    # A run that came to its end, scored all held-out text, and then went on.
    assert stops_at([4, 3, 1, 2.9, 2.8], tokens=[7, 7, 90, 7, 7]) == []
    assert stops_at([4, 3, 9, 3.1, 2.9], tokens=[7, 7, 90, 7, 7]) == []
    assert stops_at([4, 3, 1, 3.1, 3.2], tokens=[7, 7, 90, 7, 7]) == [4]
    assert stops_at([4, 6, 5.5, 5.6, 5.7], tokens=[7, 90, 90, 90, 90]) == [4]


@pytest.fixture
def worse_and_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses that rise from the second evaluation on, as a function of the model's weights would."""

    def evaluate(model: Any, *arguments: Any, windows: int, **options: Any) -> dict[str, Any]:
        loss = 3.0 + model.get_parameter("norm.weight").full_tensor().sub(1).abs().sum().item()
        return {"heldout": {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss, "tokens": windows}}

    monkeypatch.setattr(loop, "evaluate", evaluate)


@pytest.mark.usefixtures("worse_and_worse")
def test_a_run_that_was_killed_stops_at_the_step_of_one_that_was_not(
    tiny_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        steps=30,
        schedule__warmup_steps=0,
        evaluation__every=2,
        evaluation__stop_after=2,
        checkpoints__every=3,
    )
    whole, text = run(recipe, "--run_directory", str(recipe.parent / "whole"))
    assert (whole.status, whole.step) == ("finished", 4)
    assert "stopped early: no better held-out loss in 2 evaluations" in text
    summary = json.loads((whole.run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["stopped_early"]) == ("finished", 4, True)

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    # Killed at its very end: all is recorded but the summary.
    monkeypatch.setattr(loop, "write_summary", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.setattr(loop, "write_summary", lambda *arguments: None)
    resumed, _ = run(recipe)
    assert (resumed.status, resumed.step) == ("finished", 4)
    steps = [[line["step"] for line in lines] for lines in read_metrics(resumed.run / "metrics.jsonl")]
    assert steps == [[1, 2, 3, 4], [0, 2, 4, 4]]  # the last over all held-out text


def test_two_processes_stop_together_with_the_figures_of_one(tiny_recipe: Write, tmp_path: Path) -> None:
    """With Muon and averaged weights, all through the command line; by this margin nothing is ever better."""
    recipe = tiny_recipe(
        steps=9, evaluation__every=2, evaluation__stop_after=2, evaluation__stop_margin=100.0, optimizer__kind="muon",
        optimizer__orthogonalisation_dtype="float32", optimizer__ema_decay=0.5,
    )  # fmt: skip
    alone = run(recipe, "--run_directory", str(tmp_path / "alone"))[0].run
    done = torchrun(2, recipe, "--run_directory", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in (alone, tmp_path / "two"))
    assert [line["step"] for line in one[0]] == [line["step"] for line in two[0]] == [1, 2, 3, 4]
    for a, b in zip(one[0], two[0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    for a, b in zip(one[1], two[1], strict=True):
        assert a["eval"].keys() == b["eval"].keys()
        for name, result in a["eval"].items():
            assert result == pytest.approx(b["eval"][name], rel=1e-3), name
    assert "heldout_averaged" in one[1][-1]["eval"]


def test_stopping_without_evaluations_is_refused(tiny_recipe: Write) -> None:
    with pytest.raises(TrainingError, match=r"evaluation.stop_after is 2 and evaluation.every 0"):
        load_recipe(str(tiny_recipe(evaluation__every=0, evaluation__stop_after=2)))
