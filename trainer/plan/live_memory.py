"""Memory of tensors that do not exist: what a computation would have in use, followed through on fake tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an op makes until it is freed; what was there before does not count.

    Attributes:
        now: in use.
        peak: the most that was in use at once since it was last set back with `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), counts=False)  # or a view of a parameter would count as made here
        returned = func(*args, **(kwargs or {}))
        self._count(returned, counts=True)
        self.peak = max(self.peak, self.now)
        return returned

    def _count(self, tree: Any, *, counts: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._sizes:
                self._add(x.untyped_storage(), x.untyped_storage().nbytes() if counts else 0)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._sizes[key] = size
        self.now += size
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
