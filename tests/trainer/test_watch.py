"""A run followed by what it records."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tilewright.cli.main import main
from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record.display import Display
from tilewright.trainer.record.watch import watch

Write = Callable[..., Path]


def finished(recipe: Path) -> Path:
    return train(load_recipe(str(recipe)), Console(file=io.StringIO())).run


def test_lines_are_shown_as_they_come_also_torn_ones_and_those_of_a_resumed_run(tiny_recipe: Write) -> None:
    run = finished(tiny_recipe())
    record, summary = run / "metrics.jsonl", run / "summary.json"
    lines = record.read_bytes().splitlines(keepends=True)
    ended = summary.read_bytes()
    summary.unlink()
    record.unlink()
    # What the file holds at each look; the sixth is that of a run resumed from an earlier step.
    looks = iter([b"", b"".join(lines[:3]) + lines[3][:20], b"".join(lines[:4]), b"".join(lines[:2]), b"".join(lines)])

    def next_look(_: float) -> None:
        record.write_bytes(next(looks))
        if record.read_bytes() == b"".join(lines):
            summary.write_bytes(ended)

    output = io.StringIO()
    ticks = iter(range(0, 10_000, 100))
    watch(run, Display(Console(file=output, width=160), clock=lambda: next(ticks)), wait=next_look)
    shown = output.getvalue()
    for line in map(json.loads, lines):
        assert ("eval 6/6" if "eval" in line else f"step {line['step']}/6") in shown
    assert shown.count("step 1/6") == 2, "before and after the resumption"
    assert "the run has finished" in shown


def test_a_finished_run_is_shown_at_once_and_a_folder_that_is_none_refused(
    tiny_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tiny_recipe())
    assert main(["watch", str(run)]) == 0
    assert "eval 6/6" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
