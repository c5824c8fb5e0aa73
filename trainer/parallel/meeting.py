"""Where the processes of a run meet, also when ``torchrun`` has started them again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.01


def meet(timeout: timedelta) -> tuple[Any, int, int]:
    """The store, rank and number of the processes that the environment names, as `init_process_group` takes them.

    An agent of ``torchrun`` keeps its store from one start to the next, with the addresses of processes that are dead
    by then, and no number that it gives them tells all of them which start this is (pytorch/pytorch issue 135712). So
    they agree on a name that was never used before, and go by what is stored under it alone.

    Raises:
        ValueError: a variable of the environment is missing.
        torch.distributed.DistError: they cannot meet.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    name = _name_of_this_start(store, rank, size)
    return dist.PrefixStore(name, store), rank, size  # type: ignore[attr-defined]


def _name_of_this_start(store: Any, rank: int, size: int) -> str:
    """A name that the first process gives, told to those that are alive: a dead one's word is answered, and not more.

    Each of the others leaves a word of its own, new at every start, where the first looks for its rank; waits for the
    answer to that very word, which is the name; and confirms it under the name.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"word/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
        return str(name)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", mine)
            if store.check([f"{mine}/confirmed/{other}"]):
                missing.remove(other)
        time.sleep(_POLL_SECONDS)
    return mine
