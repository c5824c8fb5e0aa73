"""What kernels have issued, as numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Counts = tuple[int, ...]


def difference(now: Counts, then: Counts) -> Counts:
    """What was counted between the two."""
    return tuple(a - b for a, b in zip(now, then, strict=True))


@dataclass
class Issued:
    """What has been issued: bytes loaded and stored, operations of matrix products and of single elements, accesses to
    integers in memory, the names of the kernels that were launched, and the bytes by those names."""

    bytes: int = 0
    product_flops: int = 0
    element_flops: int = 0
    integer_accesses: int = 0
    kernels: list[str] = field(default_factory=list)
    kernel_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counts:
        """The numbers."""
        return self.bytes, self.product_flops, self.element_flops, self.integer_accesses

    def add(self, counts: Counts, times: int = 1) -> None:
        """Count `times` as much again."""
        self.bytes += times * counts[0]
        self.product_flops += times * counts[1]
        self.element_flops += times * counts[2]
        self.integer_accesses += times * counts[3]

    def taken(self) -> Issued:
        """What was counted since this was last asked."""
        counted = Issued(kernels=self.kernels, kernel_bytes=self.kernel_bytes)
        counted.add(self.counts)
        self.add(self.counts, -1)
        self.kernels, self.kernel_bytes = [], Counter()
        return counted
