"""Reading ahead changes when a batch is read, and nothing else."""

import threading

import pytest

from tilewright.corpus import CorpusError, Prefetch


class Reader:
    """Reads a step as a sentence about it; remembers which; can be made to wait."""

    def __init__(self):
        self.steps = []
        self.may_read = threading.Event()
        self.may_read.set()

    def __call__(self, step):
        self.may_read.wait()
        self.steps.append(step)
        if step == 7:
            raise CorpusError("the seventh is damaged")
        return f"step {step}"


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_steps_come_in_order_whatever_is_read_ahead(depth):
    with Prefetch(Reader(), first=10, depth=depth) as batches:
        assert [batches.take(step) for step in range(10, 40)] == [f"step {step}" for step in range(10, 40)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_more_than_the_depth_is_read_ahead(depth):
    reader = Reader()
    with Prefetch(reader, first=0, depth=depth) as batches:
        batches.take(0)
    assert len(reader.steps) <= 1 + depth
    assert set(reader.steps) <= set(range(1 + depth))


def test_the_next_steps_are_read_before_anyone_asks():
    read = [threading.Event() for _ in range(8)]
    with Prefetch(lambda step: read[step].set(), first=3, depth=2) as batches:
        assert read[3].wait(60)
        assert read[4].wait(60)
        batches.take(3)
        assert read[5].wait(60)
        assert not read[6].is_set()


@pytest.mark.parametrize("depth", [0, 3])
def test_an_error_comes_at_the_step_that_has_it_and_again_if_asked_again(depth):
    with Prefetch(Reader(), first=5, depth=depth) as batches:
        assert batches.take(5) == "step 5"
        assert batches.take(6) == "step 6"
        for _ in range(2):
            with pytest.raises(CorpusError, match="the seventh is damaged"):
                batches.take(7)
        assert batches.take(8) == "step 8"


@pytest.mark.parametrize("depth", [0, 3])
def test_going_back_to_an_earlier_step_reads_from_there(depth):
    with Prefetch(Reader(), first=0, depth=depth) as batches:
        asked = [0, 1, 2, 3, 1, 2, 3, 4, 20, 21]
        assert [batches.take(step) for step in asked] == [f"step {step}" for step in asked]


def test_leaving_ends_the_threads_also_through_an_error():
    def fail_in_the_middle():
        with Prefetch(Reader(), first=0, depth=3) as batches:
            batches.take(0)
            assert our_threads()
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert not our_threads()


def test_what_was_not_begun_when_it_ends_is_never_read():
    reader = Reader()
    reader.may_read.clear()
    batches = Prefetch(reader, first=0, depth=20)
    batches._drop()
    reader.may_read.set()
    batches.__exit__(None, None, None)
    assert len(reader.steps) <= 4
    assert not our_threads()
