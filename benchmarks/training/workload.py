"""One training step, ready to be taken again and again: the trainer's own functions, a recipe's model, fixed tokens.

The learning rate is 0. All the arithmetic of the step is done, and the weights stay as they were initialised; so every
step is the same step, and what is supposed to compute the same can be held to the same loss and gradient norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tilewright.corpus import Batch, TrainStream, open_corpus
from tilewright.model import Transformer
from tilewright.trainer.build import build
from tilewright.trainer.optimization.loss_scale import LossScale
from tilewright.trainer.optimization.optimizer import set_learning_rate
from tilewright.trainer.parallel.float8 import check_float8, generation_of
from tilewright.trainer.parallel.sharding import World, check_batch
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.step import MicroBatch, StepResult, train_step
from tilewright.trainer.trained import check_kernels, check_vocabulary

# How far loss and gradient norm of the same step may lie apart, relatively, by where the two round. A float16 has three
# bits more than a bfloat16, so it rounds by an eighth; the loss scale keeps gradients from where it has fewer.
_AGREEMENT = {"float32": (1e-5, 1e-3), "float16": (5e-4 / 8, 1e-2 / 8), "bfloat16": (5e-4, 1e-2)}


@dataclass(frozen=True)
class Workload:
    """What a step needs.

    Attributes:
        loss_scale: of float16.
        rows: this process's sequences of the step, in one batch on the host.
        tokens: where they come from, as a phrase.
    """

    recipe: Recipe
    world: World
    model: Transformer
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None
    rows: Batch
    tokens: str

    @classmethod
    def of(cls, recipe: Recipe, world: World) -> Workload:
        """The recipe's model, newly initialised, with its optimizer and the tokens of the first step.

        Raises:
            TrainingError, CorpusError: the recipe does not fit the processes, the device or its corpus.
        """
        check_batch(recipe.batch.sequences, recipe.batch.micro_batch, world.size)
        check_kernels(world.device, getattr(torch, recipe.compute_dtype))
        check_float8(recipe.float8, generation_of(world.device))
        rows, tokens = _rows(recipe, world)
        built = build(recipe, world)
        set_learning_rate(built.optimizer, 0.0)
        return cls(recipe, world, *built, rows, tokens)

    def step(self, micro_batch: int | None = None, sequences: int | None = None) -> StepResult:
        """The step on the first `sequences` of this process, `micro_batch` at a time; by default the recipe's.

        Where float16 overflows it is taken again with half the loss scale. That ends with the first steps, which are
        not timed: the scale is kept from growing again.
        """
        micro_batches = list(
            self._micro_batches(micro_batch or self.recipe.batch.micro_batch, sequences or len(self.rows.inputs))
        )
        while True:
            result = train_step(
                self.model,
                self.optimizer,
                micro_batches,
                self.world,
                max_grad_norm=self.recipe.optimizer.max_grad_norm,
                reduce_every=self.recipe.parallel.reduce == "every",
                loss_scale=self.loss_scale,
            )
            if self.loss_scale is not None:
                self.loss_scale.good_steps.zero_()
            if not result.overflowed:
                return result

    def _micro_batches(self, micro_batch: int, sequences: int) -> Iterator[MicroBatch]:
        length = self.recipe.data.sequence_length
        for first in range(0, sequences, micro_batch):
            start, end = first * length, (first + micro_batch) * length
            segments = self.rows.cu_seqlens
            # Every row starts a segment, so both ends are among the starts.
            within = segments[(segments >= start) & (segments <= end)] - np.int32(start)
            part = slice(first, first + micro_batch)
            batch = Batch(self.rows.inputs[part], self.rows.targets[part], within)
            yield MicroBatch.of(batch, self.world.device, across_documents=self.recipe.data.across_documents)

    def state_bytes(self) -> int:
        """Bytes of weights and optimizer state on this process, which are there before, during and after a step."""
        state = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
        return sum(_local_bytes(x) for x in [*self.model.parameters(), *self.model.buffers(), *state])


def disagreement(result: StepResult, expected: StepResult, compute_dtype: str) -> str:
    """How `result` is another step than `expected`, as a sentence; empty where it is the same up to rounding."""
    for what, found, right, tolerance in zip(
        ("loss", "gradient norm"),
        (result.loss, result.grad_norm),
        (expected.loss, expected.grad_norm),
        _AGREEMENT[compute_dtype],
        strict=True,
    ):
        if not math.isclose(found, right, rel_tol=tolerance):
            return f"refused: its {what} is {found:.6g} where the step as it is has {right:.6g}"
    return ""


def _rows(recipe: Recipe, world: World) -> tuple[Batch, str]:
    """This process's sequences of the recipe's first step; random ids where its corpus has not been built."""
    share = recipe.batch.sequences // world.size
    first = world.rank * share
    if recipe.data.corpus and Path(recipe.data.corpus).exists():
        corpus = open_corpus(recipe.data.corpus)
        check_vocabulary(recipe, corpus)
        stream = TrainStream(corpus.train, sequence_length=recipe.data.sequence_length, seed=recipe.seed)
        return stream.batch(range(first, first + share)), f"the first of {recipe.data.corpus}"
    return _random_rows(recipe, first, share), "random ids, each row one document"


def _random_rows(recipe: Recipe, first: int, count: int) -> Batch:
    length = recipe.data.sequence_length
    ids = np.stack(
        [
            np.random.default_rng([recipe.seed, row]).integers(recipe.model.vocab_size, size=length + 1)
            for row in range(first, first + count)
        ]
    )
    starts = np.arange(count + 1, dtype=np.int32) * np.int32(length)
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), starts)


def _local_bytes(x: torch.Tensor) -> int:
    mine = x.to_local() if isinstance(x, DTensor) else x
    return mine.nbytes


def memory_bytes(device: torch.device) -> int:
    """Of a GPU, or of the whole machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
