"""The report page while a run goes on."""

import io
import os
import subprocess

import pytest
from rich.console import Console

from tilewright.trainer.loop import train
from tilewright.trainer.recipe.file import load_recipe
from tilewright.trainer.record import live_report
from tilewright.trainer.record.live_report import LiveReport


class Writing:
    """Stands in for a process that writes a page, until told that it has come to its end."""

    def __init__(self):
        self.ended = self.killed = False

    def poll(self):
        return 0 if self.ended else None

    def kill(self):
        self.killed = True

    def wait(self):
        return -9


@pytest.fixture
def page(tmp_path):
    """A live report of a run, its clock set by hand, with the processes that it started."""
    started = []

    def start(command):
        started.append(Writing())
        return started[-1]

    now = [1000.0]
    page = LiveReport(tmp_path, clock=lambda: now[0], start=start)
    return page, started, now


def test_the_page_is_written_no_more_than_every_two_minutes_and_by_one_process_at_a_time(page):
    live, started, now = page
    live.update()
    assert started == []
    now[0] += 121
    live.update()
    live.update()
    assert len(started) == 1
    now[0] += 121
    live.update()
    assert len(started) == 1, "the first is still at it"
    started[0].ended = True
    live.update()
    assert len(started) == 2
    live.stop()
    assert started[1].killed, "it would write over the last page"
    now[0] += 1000
    live.update()
    assert len(started) == 2


def test_a_process_that_cannot_be_started_is_nothing_to_a_run(tmp_path):
    asked = []

    def start(command):
        asked.append(command)
        raise OSError("no more processes")

    now = iter([0.0, 200.0, 200.0, 400.0, 400.0])
    with LiveReport(tmp_path, clock=lambda: next(now), start=start) as live:
        live.update()
        live.update()
    assert len(asked) == 2, "it is asked for again the next time"


def test_the_page_is_written_while_a_run_trains_and_says_at_its_end_that_it_has_ended(
    tiny_recipe, monkeypatch, read_page
):
    pages, times = [], iter(range(100))

    def start(command):
        if next(times) == 1:  # at the evaluation after the first step; one page tells enough
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            pages.append(read_page(live_report.Path(command[-1]) / "report.html"))
        writing = Writing()
        writing.ended = True
        return writing

    monkeypatch.setattr(live_report, "SECONDS_BETWEEN_PAGES", 0.0)
    monkeypatch.setattr(live_report, "_start", start)
    recipe = tiny_recipe(steps=2, evaluation={"every": 1, "windows": 4}, checkpoints={"every": 0})
    outcome = train(load_recipe(str(recipe)), Console(file=io.StringIO()))
    assert next(times) == 4, "at both evaluations, at the last one and at the checkpoint"
    (middle,), end = pages, read_page(outcome.report)
    assert "running" in middle.text
    assert "1 of 2 steps" in middle.text
    assert ("meta", {"http-equiv": "refresh", "content": "30"}) in [(tag, dict(a)) for tag, a in middle.elements]
    assert "summary.json" not in middle.text
    assert "refresh" not in end.source
    assert "finished" in end.text


def test_the_page_of_a_run_that_fails_no_longer_says_that_it_runs(tmp_path, page):
    live, started, now = page
    now[0] += 121
    live.update()
    (tmp_path / "report.html").write_text("running")

    def run():
        with live:
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        run()
    assert started[0].killed
    assert "not finished" in (tmp_path / "report.html").read_text()


def test_a_last_page_that_cannot_be_drawn_hides_nothing_of_what_ended_the_run(page, monkeypatch):
    live, started, now = page
    now[0] += 121
    live.update()

    def no_backend(run):
        raise ImportError("no module named matplotlib")

    def run():
        with live:
            raise RuntimeError("broke")

    monkeypatch.setattr(live_report, "write_report", no_backend)
    with pytest.raises(RuntimeError, match="broke"):
        run()
    assert started[0].killed
