"""What a run keeps in its checkpoints is what it goes on from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tilewright.trainer.checkpoints.run_state import RunState
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.recipe.file import load_recipe

from .conftest import Write

Start = Callable[[], RunState]


@pytest.fixture
def start(tiny_recipe: Write, tmp_path: Path, process: World) -> Iterator[Start]:
    """Gives the state of a float16 run as a start of it finds it: steps of 8 samples, the weights averaged."""
    recipe = load_recipe(str(tiny_recipe(compute_dtype="float16", optimizer__ema_decay=0.5)))

    with ExitStack() as stack:
        yield lambda: RunState(recipe, tmp_path / "run", process, stack)


def take_step(state: RunState, change: float) -> None:
    """Take a step that adds `change` to everything: a step of no optimizer, but one that each part shows."""
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(change)
            state.optimizer.state[parameter]["exp_avg"].add_(change)
    assert state.loss_scale is not None
    state.loss_scale.scale.fill_(change * 8)
    state.loss_scale.good_steps.add_(1)
    state.count_step()


def tensors(state: RunState) -> list[torch.Tensor]:
    """Copies of all that a checkpoint keeps but the position."""
    assert state.loss_scale is not None
    assert state.average is not None
    moments = [state.optimizer.state[parameter]["exp_avg"] for parameter in state.model.parameters()]
    sharded = [*state.model.parameters(), *moments, *state.average.state().values()]
    return [x.full_tensor().detach().clone() for x in sharded] + [x.clone() for x in state.loss_scale.state().values()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_part_of_a_run_comes_back_from_its_newest_checkpoint(start: Start) -> None:
    state = start()
    assert (state.step, state.saved_step, state.position.first_sample(0)) == (0, 0, 0)
    for change in (0.5, 0.25):
        take_step(state, change)
        state.save(heldout=None)
    state.writer.wait()
    kept = tensors(state)
    take_step(state, 4.0)  # lost with its process
    again = start()
    assert (again.step, again.saved_step, again.averaged_from, again.position.first_sample(2)) == (2, 2, 0, 16)
    assert_equal(tensors(again), kept)


def test_a_run_that_goes_back_has_what_it_had_there_and_other_samples_ahead_also_in_its_next_start(
    start: Start,
) -> None:
    state = start()
    take_step(state, 0.5)
    state.save(heldout=None)
    kept = tensors(state)
    for change in (0.25, 4.0):
        take_step(state, change)
    rollback = state.go_back("a spike")
    assert (rollback.step, rollback.to, rollback.sample, rollback.cause) == (3, 1, 24, "a spike")
    for after in (state, start()):
        assert (after.step, after.saved_step, after.position.first_sample(1)) == (1, 1, 24)
        assert_equal(tensors(after), kept)
