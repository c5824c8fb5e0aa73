"""Learning rates at the steps where a slip would show: first, end of warm-up, start and end of the decay."""

import pytest

from tilewright.trainer.recipe import Schedule
from tilewright.trainer.schedule import learning_rate_factor


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


@pytest.mark.parametrize("kind", ["cosine", "warmup_stable_decay", "constant"])
def test_one_step_and_no_warm_up_work(kind: str) -> None:
    assert 0.0 <= learning_rate_factor(Schedule(kind=kind), 0, 1) <= 1.0  # type: ignore[arg-type]
