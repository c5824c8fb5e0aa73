"""Samples of several sources in the proportions asked for, each source in an order and in epochs of its own."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tilewright.corpus import CorpusError, MixtureStream, Split, TrainStream, whole_shares
from tilewright.corpus.mixture import Deal


@pytest.fixture
def split(write_shards, tmp_path):
    """A split of so many one-token windows, whose tokens count up from a number that says which split it is."""

    def make(first, windows):
        tokens = list(range(first, first + windows + 1))
        return Split(write_shards([[tokens]], folder=tmp_path / f"from-{first}"), end_of_text=0)

    return make


WEIGHTS = [
    [1.0],
    [0.7, 0.3],
    [0.5, 0.5],
    [0.97, 0.01, 0.02],
    [3, 1, 1],
    [0.4, 0.3, 0.2, 0.1],
    [1, 1, 1, 1, 1, 1, 29],
    [0.123, 0.456, 0.421],
    [27, 1, 27],
    [30, 6, 30, 1, 13, 1, 30],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_holds_each_source_as_often_as_an_integer_can_be_near_its_weight(weights):
    """Tijdeman's bound, 1 - 1 / (2k - 2): half a sample for two sources, less than one for any number of them."""
    deal = Deal(weights)
    exact = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
    counts = [0] * len(weights)
    for samples in range(1, 2 * deal.period + 2):
        counts[deal(samples - 1)[0]] += 1
        assert counts == deal.counts(samples)
        assert all(abs(count - samples * weight) <= bound for count, weight in zip(counts, exact, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_samples_of_a_source_are_numbered_without_a_gap(weights):
    deal = Deal(weights)
    turns = [[] for _ in weights]
    for sample in range(3 * deal.period):
        source, turn = deal(sample)
        turns[source].append(turn)
    assert turns == [list(range(len(turn))) for turn in turns]


def test_a_sample_far_into_a_run_is_dealt_without_the_ones_before_it():
    deal = Deal([0.7, 0.3])
    far = 10**15
    assert [deal(far + sample)[0] for sample in range(10)] == [deal(sample)[0] for sample in range(10)]
    assert deal.counts(far) == [7 * far // 10, 3 * far // 10]
    assert deal(far) == (deal(0)[0], deal.counts(far)[deal(0)[0]])


@pytest.mark.parametrize(
    ("weights", "shares"), [([0.7, 0.3], [7, 3]), ([70, 30], [7, 3]), ([1, 2, 1e-2], [100, 200, 1]), ([5], [1])]
)
def test_weights_are_relative_and_their_decimals_are_exact(weights, shares):
    assert whole_shares(weights) == shares


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0], "weight is 0; give each a finite weight above 0"),
        ([0.5, -1.0], r"weight is -1\.0; give"),
        ([float("inf"), 1], "weight is inf; give"),
        ([float("nan"), 1], "weight is nan; give"),
        ([0.123457, 1], r"0\.123457, 1 come out even only after 1,123,457 samples, .* give rounder weights"),
    ],
)
def test_weights_that_cannot_be_dealt_are_refused(weights, message):
    with pytest.raises(CorpusError, match=message):
        Deal(weights)


def test_each_source_is_gone_through_in_epochs_of_its_own(split):
    """7 of 10 samples from 70 windows, 3 from 20: after 200 samples two epochs of the one and three of the other."""
    stream = MixtureStream({"new": split(1, 70), "old": split(1001, 20)}, [0.7, 0.3], sequence_length=1, seed=5)
    firsts = stream.batch(range(200)).inputs[:, 0].tolist()
    new = [token for token in firsts if token < 1000]
    old = [token for token in firsts if token > 1000]
    epochs = [new[:70], new[70:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 71))] * 2
    assert epochs[0] != epochs[1]
    assert [sorted(old[start : start + 20]) for start in (0, 20, 40)] == [list(range(1001, 1021))] * 3
    assert stream.epochs(200) == {"new": 2.0, "old": 3.0}


def test_sources_of_one_size_have_orders_of_their_own(split):
    stream = MixtureStream({"a": split(1, 50), "b": split(1001, 50)}, [1, 1], sequence_length=1, seed=5)
    firsts = stream.batch(range(100)).inputs[:, 0]
    assert (firsts[firsts < 1000] != firsts[firsts > 1000] - 1000).any()


def test_a_source_gives_the_same_samples_whatever_it_is_mixed_with(split):
    new, old, more = split(1, 70), split(1001, 20), split(2001, 20)

    def of_old(splits, weights):
        firsts = MixtureStream(splits, weights, sequence_length=1, seed=5).batch(range(300)).inputs[:, 0]
        return firsts[(firsts > 1000) & (firsts < 2000)][:25].tolist()

    alone = of_old({"old": old}, [1])
    assert len(alone) == 25
    assert of_old({"new": new, "old": old}, [0.7, 0.3]) == alone
    assert of_old({"more": more, "old": old, "new": new}, [1, 3, 5]) == alone


def test_a_sample_does_not_depend_on_what_was_asked_before_or_with_it(split):
    splits = {"new": split(1, 70), "old": split(1001, 20)}
    together = MixtureStream(splits, [2, 1], sequence_length=3, seed=7).batch(range(60))
    again = MixtureStream(splits, [2, 1], sequence_length=3, seed=7)
    for sample in (59, 0, 17, 17):
        alone = again.batch([sample])
        assert alone.inputs[0].tolist() == together.inputs[sample].tolist()
        assert alone.targets[0].tolist() == together.targets[sample].tolist()
    assert (MixtureStream(splits, [2, 1], sequence_length=3, seed=8).batch(range(60)).inputs != together.inputs).any()


def test_one_source_alone_gives_windows_as_a_train_stream_does(split):
    source = split(1, 12)
    mixed = MixtureStream({"one": source}, [0.3], sequence_length=4, seed=0).batch(range(3))
    plain = TrainStream(source, sequence_length=4, seed=0).batch(range(3))
    assert np.array_equal(np.sort(mixed.inputs, axis=0), np.sort(plain.inputs, axis=0))
    assert mixed.cu_seqlens.tolist() == plain.cu_seqlens.tolist()


def test_a_sample_before_the_first_is_refused(split):
    with pytest.raises(IndexError, match="sample index is -1"):
        MixtureStream({"one": split(1, 12)}, [1], sequence_length=4, seed=0).batch([-1])


def test_a_source_too_short_for_a_sample_is_named(split):
    splits = {"long": split(1, 50), "short": split(1001, 3)}
    with pytest.raises(CorpusError, match=r"length of 10 is longer than the shards allow: .*from-1001 holds 4"):
        MixtureStream(splits, [1, 1], sequence_length=10, seed=0)


def test_neighbours_in_the_deal_are_spread_over_the_period():
    """Not seven of the one and then three of the other."""
    dealt = [Deal([0.7, 0.3])(sample)[0] for sample in range(1000)]
    runs = [len(list(run)) for _, run in itertools.groupby(dealt)]
    assert max(runs) == 3


def test_the_documents_of_a_sample_are_named_by_source_shard_and_number(write_shards, tmp_path):
    new = Split(write_shards([[[1, 0]], [[2, 0], [3, 0]]], folder=tmp_path / "new"), end_of_text=0)
    old = Split(write_shards([[[7, 0]]], folder=tmp_path / "old"), end_of_text=0)
    stream = MixtureStream({"new": new, "old": old}, [1, 1], sequence_length=1, seed=0)
    known = {
        (1, 0): ["new/00000.ds:0"],
        (0, 2): ["new/00000.ds:0", "new/00001.ds:0"],
        (2, 0): ["new/00001.ds:0"],
        (0, 3): ["new/00001.ds:0", "new/00001.ds:1"],
        (3, 0): ["new/00001.ds:1"],
        (7, 0): ["old/00000.ds:0"],
    }
    batch = stream.batch(range(10))
    for sample, window in enumerate(zip(batch.inputs[:, 0].tolist(), batch.targets[:, 0].tolist(), strict=True)):
        assert stream.documents(sample) == [str(tmp_path / document) for document in known[window]]
