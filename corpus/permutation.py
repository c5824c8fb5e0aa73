"""A shuffled order of n things, computed one place at a time instead of stored.

A Feistel network permutes pairs (left, right) of numbers below `side`, the smallest with side² >= n: each round maps
them to (right, (left + F(right)) mod side), which can be undone whatever F is. Places that fall at n or beyond are sent
through again until they come back below n, which they do because a permutation's cycle returns to where it began; the
result is a permutation of exactly n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). As side² exceeds
n by at most about 2√n, a second pass is rare.
"""

import hashlib
import math
import struct

_ROUNDS = 8
_WORD = (1 << 64) - 1


class Permutation:
    """A bijection of 0 .. size - 1 that depends on (size, seed, epoch) alone; constant memory at any size.

    It shuffles well; it keeps no secrets.
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; a permutation needs at least 1")
        self.size = size
        self._side = math.isqrt(size - 1) + 1
        digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = struct.unpack(f"<{_ROUNDS}Q", digest)

    def __call__(self, index: int) -> int:
        """Where `index` goes; `IndexError` unless 0 <= index < size."""
        if not 0 <= index < self.size:
            raise IndexError(f"index is {index}; the permutation has {self.size} places")
        place = self._encrypt(index)
        while place >= self.size:
            place = self._encrypt(place)
        return place

    def _encrypt(self, place: int) -> int:
        left, right = divmod(place, self._side)
        for key in self._round_keys:
            left, right = right, (left + _mix(right ^ key)) % self._side
        return left * self._side + right


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
