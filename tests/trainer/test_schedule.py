"""Learning rates at the steps where a slip would show: first, end of warm-up, start and end of the decay."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tilewright.trainer import TrainingError
from tilewright.trainer.optimization.schedule import learning_rate_factor
from tilewright.trainer.recipe import Schedule
from tilewright.trainer.recipe.file import load_recipe


def factors(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate_factor(schedule, step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_from_above_zero_to_one() -> None:
    got = factors(Schedule(kind="constant", warmup_steps=4), 6)
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_the_final_fraction_at_the_last_step() -> None:
    got = factors(Schedule(kind="cosine", warmup_steps=1, final_fraction=0.2), 5)
    assert got[0] == 1.0
    assert got[2] == pytest.approx(0.2 + 0.8 * 0.5)  # half way down the cosine
    assert got[4] == pytest.approx(0.2)
    assert got == sorted(got, reverse=True)


def test_warmup_stable_decay_stays_at_one_and_then_falls_linearly() -> None:
    got = factors(Schedule(kind="warmup_stable_decay", warmup_steps=2, decay_steps=4, final_fraction=0.0), 10)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_linear_falls_evenly_to_the_final_fraction_at_the_last_step() -> None:
    got = factors(Schedule(kind="linear", warmup_steps=2, final_fraction=0.2), 6)
    assert got == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_restart_warms_up_from_where_the_cycle_before_ended_and_decays_again() -> None:
    schedule = Schedule(kind="linear", warmup_steps=1, final_fraction=0.1, restarts=[4], restart_warmup_steps=3)
    assert factors(schedule, 10) == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.4, 0.7, 1.0, 0.7, 0.4, 0.1])


def test_each_restart_has_the_curve_of_its_own_length_and_the_peak_that_the_recipe_says() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=1, final_fraction=0.0, restarts=[3, 6], restart_peak=0.5)
    half = [0.5, 0.5 * 0.5, 0.0]  # one step of warm-up, then a cosine of two
    assert factors(schedule, 9) == pytest.approx([1.0, 0.5, 0.0, *half, *half])
    assert factors(schedule, 8) == pytest.approx([1.0, 0.5, 0.0, *half, 0.5, 0.0])


def test_warmup_stable_decay_restarts_from_its_low_end_to_its_plateau() -> None:
    schedule = Schedule(
        kind="warmup_stable_decay", warmup_steps=1, decay_steps=2, final_fraction=0.2, restarts=[5],
        restart_warmup_steps=2, restart_peak=0.8,
    )  # fmt: skip
    first = [1.0, 1.0, 1.0, 0.6, 0.2]
    assert factors(schedule, 11) == pytest.approx([*first, 0.5, 0.8, 0.8, 0.8, 0.5, 0.2])


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay", "constant"])
def test_a_restart_changes_nothing_before_it(kind: str) -> None:
    """What a run has done so far stays what the longer recipe says, so that it can be gone on with."""
    plain = Schedule(kind=kind, warmup_steps=2, decay_steps=3)  # type: ignore[arg-type]
    longer = dataclasses.replace(plain, restarts=[10], restart_warmup_steps=4)
    assert factors(longer, 20)[:10] == factors(plain, 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"restarts": [4, 3]},
            r"schedule.restarts is \[4, 3\]; it must be rising steps after 0 and before steps \(6\)",
        ),
        ({"restarts": [6]}, r"schedule.restarts is \[6\]; it must be rising"),
        ({"restarts": [0]}, r"schedule.restarts is \[0\]; it must be rising"),
        ({"restarts": [1]}, r"warmup_steps \(2\) .* are more than the first of schedule.restarts \(1\)"),
        ({"restarts": [5]}, r"the warm-up of a restart \(2\) .* are more than the 1 steps"),
        ({"restart_warmup_steps": -1}, r"schedule.restart_warmup_steps is -1; it must be 0 or more"),
        ({"restart_peak": -0.5}, r"schedule.restart_peak is -0.5; it must be 0 or more"),
    ],
)
def test_restarts_that_do_not_fit_are_refused(
    tiny_recipe: Callable[..., Path], overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_recipe(str(tiny_recipe(**{f"schedule__{key}": value for key, value in overrides.items()})))


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay", "constant"])
def test_one_step_and_no_warm_up_work(kind: str) -> None:
    assert 0.0 <= learning_rate_factor(Schedule(kind=kind), 0, 1) <= 1.0  # type: ignore[arg-type]
