"""Scoring held-out text: loss, perplexity, and bits per byte, which compares across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tilewright.corpus import IGNORE, Batch, HeldOutStream
from tilewright.trainer.data import HELDOUT
from tilewright.trainer.health.hang import alive
from tilewright.trainer.parallel.sharding import World
from tilewright.trainer.step import MicroBatch


class ScoringStopped(Exception):
    """Scoring ended before its end, as it was asked to."""


def evaluate(
    model: nn.Module,
    streams: Mapping[str, HeldOutStream],
    world: World,
    *,
    windows: int,
    micro_batch: int,
    byte_lengths: npt.NDArray[np.int32],
    across_documents: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
    """Score `windows` windows of each stream, spread evenly over it (0 or too many: all of them).

    Args:
        streams: held-out text by name.
        byte_lengths: (vocab,), the bytes of UTF-8 that each token stands for.
        stopped: whether to stop, asked before each forward pass; the processes must agree.

    Returns:
        By name, ``heldout`` first, which is all of them together: loss (nats a token), perplexity (its exponential),
        bits_per_byte (bits over all tokens ÷ bytes of the text they stand for) and tokens (how many were scored).

    Raises:
        ScoringStopped: `stopped` said so.
    """
    model.eval()
    try:
        sums = {
            name: _summed(model, stream, world, windows, micro_batch, byte_lengths, across_documents, stopped)
            for name, stream in streams.items()
        }
    finally:
        model.train()
        # Without a backward pass nothing shards the parameters again; until then the model shows other ones than the
        # optimizer holds.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    together = np.sum(list(sums.values()), axis=0).tolist()
    return {HELDOUT: _figures(*together)} | {name: _figures(*each) for name, each in sums.items()}


@torch.no_grad()
def _summed(
    model: nn.Module,
    stream: HeldOutStream,
    world: World,
    windows: int,
    micro_batch: int,
    byte_lengths: npt.NDArray[np.int32],
    across_documents: bool,
    stopped: Callable[[], bool],
) -> list[float]:
    """Nats, tokens and the bytes that they stand for, over all processes."""
    chosen = _spread(len(stream), windows)
    mine = chosen[world.rank :: world.size]
    # Every process makes as many forward passes as the busiest, for each is a collective under sharding.
    passes = -(-len(chosen[:: world.size]) // micro_batch)
    nats = tokens = text_bytes = 0.0
    for number in range(passes):
        part = mine[number * micro_batch : (number + 1) * micro_batch]
        batch = _padded(stream, part, micro_batch)
        micro = MicroBatch.of(batch, world.device, across_documents=across_documents)
        alive()
        if stopped():
            raise ScoringStopped
        nats += float(model(micro.inputs, micro.targets, micro.cu_seqlens))
        scored = batch.targets[batch.targets != IGNORE]
        tokens += scored.size
        text_bytes += float(byte_lengths[scored].sum())
    return list(world.sum(nats, tokens, text_bytes))


def _figures(nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    loss = nats / max(tokens, 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1.0),
        "tokens": tokens,
    }


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over range(count); all of them if there are no more."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return [number * count // wanted for number in range(wanted)]


def _padded(stream: HeldOutStream, windows: Sequence[int], micro_batch: int) -> Batch:
    """A batch of always `micro_batch` rows, so that nothing is compiled anew; rows past `windows` count for nothing."""
    batch = stream.batch([*windows, *[0] * (micro_batch - len(windows))])
    batch.targets[len(windows) :] = IGNORE
    return batch
