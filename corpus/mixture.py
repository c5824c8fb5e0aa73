"""One stream over several weighted sources, as continual pretraining needs: 70% new text, 30% of the old, say.

A sample is a pure function of (seed, global sample index) here too. The weights, brought to whole shares without a
common divisor, say how many samples of a period each source gives: 0.7 and 0.3 are 7 and 3 of every 10. Which sample of
the period is whose is dealt once, by Tijdeman's rule, and looked up from then on: of the sources whose turn may come,
the one whose turn must come first. With k sources of weights w, the first n samples hold every source within
1 - 1 / (2k - 2) of n · w times, which no rule betters for all weights (R. Tijdeman, "The chairman assignment problem",
Discrete Mathematics 32, 1980).

Each source has a shuffled order and epochs of its own, which depend on the seed and on its name: another source, or
another weight, changes when a sample of it comes and never which sample comes next.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tilewright.corpus.errors import CorpusError
from tilewright.corpus.split import Split
from tilewright.corpus.stream import Batch, TrainStream, batch_of

LONGEST_PERIOD = 100_000


class Deal:
    """Which source gives each sample.

    Attributes:
        shares: whole numbers without a common divisor, in proportion to the weights.
        period: their sum; every so many samples hold each source exactly its share of times.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Deal by `weights`, whose decimal digits count: 0.7 is seven tenths.

        Raises:
            CorpusError: a weight is not above 0, or together they need a period of more than `LONGEST_PERIOD`.
        """
        self.shares = whole_shares(weights)
        self.period = sum(self.shares)
        dealt = np.fromiter(_dealt(self.shares), dtype=np.int64, count=self.period)
        self._source = dealt
        # How many samples of the same source come before it in its period.
        self._turn = np.empty_like(dealt)
        for source, share in enumerate(self.shares):
            self._turn[dealt == source] = np.arange(share)

    def __call__(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples of that source come before it."""
        period, place = divmod(sample, self.period)
        source = int(self._source[place])
        return source, period * self.shares[source] + int(self._turn[place])

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source gives."""
        periods, rest = divmod(samples, self.period)
        in_rest = np.bincount(self._source[:rest], minlength=len(self.shares))
        return [periods * share + int(more) for share, more in zip(self.shares, in_rest, strict=True)]


class MixtureStream:
    """Endless samples of several splits in fixed proportions; see `TrainStream` for one."""

    def __init__(
        self, splits: Mapping[str, Split], weights: Sequence[float], *, sequence_length: int, seed: int
    ) -> None:
        """Mix the splits, each known by its name, with one weight each.

        Raises:
            CorpusError: as `Deal` does, or a split is too short for one sample.
        """
        self.deal = Deal(weights)
        self._names = list(splits)
        self._streams = [
            TrainStream(split, sequence_length=sequence_length, seed=_seed_of(seed, name))
            for name, split in splits.items()
        ]
        self._sequence_length = sequence_length

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples of those global indices, one a row."""
        return batch_of([self.place(sample) for sample in samples], self._sequence_length)

    def place(self, sample: int) -> tuple[Split, int]:
        """Where a sample is read: the split, and its first token there."""
        stream, index = self._origin(sample)
        return stream.place(index)

    def documents(self, sample: int) -> list[str]:
        """The documents that a sample reads from, as ``FOLDER/SHARD.ds:NUMBER``, numbers counting from 0."""
        stream, index = self._origin(sample)
        return stream.documents(index)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples go through each source, by its name."""
        counts = self.deal.counts(samples)
        return {
            name: count / stream.samples_per_epoch
            for name, count, stream in zip(self._names, counts, self._streams, strict=True)
        }

    def _origin(self, sample: int) -> tuple[TrainStream, int]:
        if sample < 0:
            raise IndexError(f"sample index is {sample}; the first is 0")
        source, index = self.deal(int(sample))
        return self._streams[source], index


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in proportion to the weights; raises `CorpusError` as `Deal` does."""
    for weight in weights:
        if not 0 < weight < math.inf:
            raise CorpusError(f"A source's weight is {weight}; give each a finite weight above 0.")
    exact = [Fraction(str(weight)) for weight in weights]
    multiple = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * multiple) for weight in exact]
    divisor = math.gcd(*whole)
    shares = [share // divisor for share in whole]
    if sum(shares) > LONGEST_PERIOD:
        raise CorpusError(
            f"The weights {', '.join(str(weight) for weight in weights)} come out even only after {sum(shares):,} "
            f"samples, and at most {LONGEST_PERIOD:,} are dealt at a time; give rounder weights, such as 0.7 and 0.3."
        )
    return shares


def _dealt(shares: Sequence[int]) -> list[int]:
    """The source of each sample of one period."""
    period, slack = sum(shares), max(1, 2 * len(shares) - 2)
    # What each source is due, times the period: `share` more with each sample, a whole period less with its own.
    due = [0] * len(shares)
    dealt = []
    for _ in range(period):
        due = [one + share for one, share in zip(due, shares, strict=True)]
        # In n samples a source must have come at least n · w - 1 + 1 / slack times; this is how soon that binds.
        urgent = min(
            (((slack - 1) * period - slack * one) / share, source)
            for source, (one, share) in enumerate(zip(due, shares, strict=True))
            if slack * one >= period
        )
        source = urgent[1]
        due[source] -= period
        dealt.append(source)
    return dealt


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
