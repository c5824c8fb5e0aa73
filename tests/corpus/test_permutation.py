"""The shuffled order visits everything once, differs by seed and epoch, and costs the same at any size."""

import itertools

import pytest

from tilewright.corpus import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 63, 64, 65, 101, 997, 4096, 5000])
def test_every_place_is_reached_exactly_once(size):
    for epoch in range(3):
        permutation = Permutation(size, seed=5, epoch=epoch)
        assert sorted(permutation(index) for index in range(size)) == list(range(size))


def test_seed_and_epoch_each_give_another_order():
    orders = {
        tuple(map(Permutation(1000, seed=seed, epoch=epoch), range(1000))) for seed in (0, 1, -1) for epoch in range(4)
    }
    assert len(orders) == 12


def test_the_order_is_the_same_on_every_machine():
    assert [Permutation(10, seed=0, epoch=0)(index) for index in range(10)] == [2, 9, 5, 8, 7, 3, 6, 0, 1, 4]


def test_places_are_spread_as_chance_would_have_them():
    size = 10_000
    places = [Permutation(size, seed=3, epoch=0)(index) for index in range(size)]
    rising = sum(after > before for before, after in itertools.pairwise(places))
    assert abs(rising / size - 0.5) < 0.02
    moved = sum(abs(place - index) for index, place in enumerate(places)) / size
    assert abs(moved / size - 1 / 3) < 0.02


def test_a_huge_size_takes_no_table():
    size = 10**13 + 7
    permutation = Permutation(size, seed=0, epoch=0)
    places = [permutation(index) for index in range(1000)]
    assert len(set(places)) == 1000
    assert 0 <= min(places) < size / 10
    assert size * 9 / 10 < max(places) < size


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match="has 10 places"):
        Permutation(10, seed=0, epoch=0)(index)


def test_an_empty_permutation_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, seed=0, epoch=0)
