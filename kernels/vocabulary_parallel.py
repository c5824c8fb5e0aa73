"""Rows of logits whose classes are split over a process group: what one rank holds, and how the ranks make whole rows.

Rank r of p holds the classes [r · V/p, (r + 1) · V/p) of every row, and every rank all the targets (Megatron-LM,
arXiv:1909.08053, section 3). Each reduces its part of a row to four numbers,

    m = max z      s = Σ exp(z − m)      z_t, the target's z, 0 where another rank holds it      Σ z

and two collectives of rows × 1 and rows × 3 numbers, whatever V, make those of the whole row out of them:

    M = max m      S = Σ s · exp(m − M)      Σ z_t      Σ Σ z
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """The classes that this rank holds, as kernels take them."""

    first_class: int
    all_classes: int


def check_group(op: str, group: Any) -> None:
    """Raise ``ValueError`` unless `group` is None or a process group that this process belongs to."""
    if group is None:
        return
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise ValueError(f"{op}: group is {group!r}; it must be a torch.distributed.ProcessGroup, or None")
    if distributed.get_rank(group) < 0:
        raise ValueError(f"{op}: group has no rank for this process; it must be a group that the process belongs to")


def shard_of(group: ProcessGroup | None, width: int) -> Shard:
    """This rank's classes where each rank of `group` holds `width`; all of them without a group."""
    if group is None:
        return Shard(0, width)
    return Shard(distributed.get_rank(group) * width, distributed.get_world_size(group) * width)


# The widths already known to be the same on all ranks of a group.
_agreed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def whole_rows(op: str, parts: torch.Tensor, width: int, group: ProcessGroup) -> torch.Tensor:
    """The statistics (rows, 4) of whole rows, the same on every rank, from those of this rank's `width` classes.

    The columns are maximum, Σ exp(z − maximum), z of the target and Σ z.

    Raises:
        ValueError: the ranks hold different numbers of classes. On a GPU, where looking waits for the device, this is
            seen only when a width is new to the process.
    """
    rows = parts.shape[0]
    # The width travels with the maxima, itself and negated: no collective of its own, so that no rank can wait for it.
    top = parts.new_empty(rows + 2)
    top[:rows] = parts[:, 0]
    top[rows].fill_(width)
    top[rows + 1].fill_(-width)
    distributed.all_reduce(top, distributed.ReduceOp.MAX, group)
    seen = _agreed.setdefault(group, set())
    if parts.device.type == "cpu" or width not in seen:
        widest, narrowest = top[rows:].tolist()
        if widest != -narrowest:
            raise ValueError(
                f"{op}: this rank of group holds {width} classes and others hold {int(-narrowest)} to {int(widest)}; "
                "every rank must hold the same number"
            )
        seen.add(width)
    sums = parts[:, 1:].clone()
    sums[:, 0] *= torch.exp(parts[:, 0] - top[:rows])
    distributed.all_reduce(sums, distributed.ReduceOp.SUM, group)
    return torch.cat([top[:rows, None], sums], 1)
