"""Throughput over the whole time of a run, with its pauses."""

from pathlib import Path

from tilewright.trainer.record.starts import STARTS, WallClock, read_starts


def test_the_time_between_a_stop_and_the_next_start_counts(tmp_path: Path) -> None:
    first = WallClock(tmp_path, step=0, processes=2, now=1000.0)
    assert first.rate(500, now=1010.0) == 50.0
    again = WallClock(tmp_path, step=5, processes=4, now=4000.0)
    assert again.rate(4000, now=5000.0) == 1.0
    assert [(start["step"], start["processes"]) for start in read_starts(tmp_path)] == [(0, 2), (5, 4)]


def test_steps_lost_before_the_first_checkpoint_cost_time_as_well(tmp_path: Path) -> None:
    WallClock(tmp_path, step=0, processes=1, now=1000.0)
    again = WallClock(tmp_path, step=0, processes=1, now=1090.0)
    assert again.rate(100, now=1100.0) == 1.0


def test_of_a_run_whose_beginning_was_not_recorded_nothing_is_said(tmp_path: Path) -> None:
    assert WallClock(tmp_path, step=7, processes=1, now=1000.0).rate(100, now=1010.0) is None
    assert WallClock(tmp_path, step=9, processes=1, now=2000.0).rate(100, now=2010.0) is None


def test_a_line_that_a_crash_tore_is_left_out(tmp_path: Path) -> None:
    (tmp_path / STARTS).write_text('{"time": 1000.0, "step": 0, "processes": 1}\n{"time": 20')
    assert len(read_starts(tmp_path)) == 1
    assert WallClock(tmp_path, step=2, processes=1, now=3000.0).rate(100, now=1100.0) == 1.0
    assert [start["step"] for start in read_starts(tmp_path)] == [0, 2]
