"""Profiles of chosen steps, and that they are told apart from the others."""

import gzip
import io
import json

import pytest
from rich.console import Console

from tilewright.cli.main import main
from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.metrics import read_metrics


def trained(recipe):
    console = Console(file=io.StringIO(), width=500)
    return train(load_recipe(str(recipe)), console).run, console.file.getvalue()


def test_the_steps_that_are_named_are_profiled_and_marked_and_no_others(tiny_recipe):
    run, said = trained(tiny_recipe(steps=3, profile={"steps": [1, 3], "memory": True}))
    assert {path.name for path in (run / "profile").iterdir()} == {"step-00000001", "step-00000003"}
    for step in (1, 3):
        folder = run / "profile" / f"step-{step:08d}"
        with gzip.open(folder / "rank-0.trace.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::mm", "[memory]"} <= names
        assert "aten::mm" in (folder / "rank-0.ops.txt").read_text()
        assert said.count(f"step {step} profiled: {folder}") == 1
    lines = read_metrics(run / "metrics.jsonl")[0]
    assert [line["step"] for line in lines if line["profiled"]] == [1, 3]
    medians = json.loads((run / "summary.json").read_text())["step_seconds"]
    assert list(medians.values()) == [pytest.approx(8 * 32 / lines[1]["tokens_per_second"])]
    assert said.count("a memory snapshot needs a GPU") == 1


def test_a_process_that_is_not_named_leaves_no_profile_but_marks_the_step_that_others_slow_down(tiny_recipe):
    run, _ = trained(tiny_recipe(steps=2, profile={"steps": [1], "ranks": [3]}))
    assert not (run / "profile").exists()
    assert [line["profiled"] for line in read_metrics(run / "metrics.jsonl")[0]] == [True, False]


def test_a_profile_that_cannot_be_written_is_told_and_the_run_goes_on(tiny_recipe, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "profile").write_text("no folder")
    run, said = trained(tiny_recipe(steps=2, run_directory=str(tmp_path / "here"), profile={"steps": [2]}))
    assert "step 2 was profiled, and its profile could not be written" in said
    assert len(read_metrics(run / "metrics.jsonl")[0]) == 2


def test_a_step_or_process_that_cannot_be_is_refused(tiny_recipe, capsys):
    for override, sentence in (
        (["--profile.steps", "[7]"], "profile.steps names step 7; this run has the steps 1 to 6"),
        (["--profile.steps", "[0]"], "profile.steps names step 0"),
        (["--profile.ranks", "[-1]"], "profile.ranks names process -1"),
    ):
        assert main(["train", str(tiny_recipe()), *override]) == 2
        assert sentence in capsys.readouterr().err
