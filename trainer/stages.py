"""Steps that grow over a run: how many sequences each takes, how far attention reaches in them, and which they are.

    batch: {sequences: 64, micro_batch: 4, stages: [{step: 1000, sequences: 128}, {step: 5000, sequences: 256}]}
    data: {sequence_length: 8192, sequence_length_stages: [{step: 0, length: 1024}, {step: 2000, length: 8192}]}

A sample of the stream is always `data.sequence_length` tokens. A stage of a shorter length cuts each into as many
documents as fit, which do not see each other: a step has as many tokens as before, none is lost, and the stream knows
nothing of it. Shapes stay, so nothing is compiled anew where documents are packed.

Batch ramp: arXiv:2005.14165; sequence-length warm-up: arXiv:2108.06084.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right

import torch

from tilewright.trainer.parallel.sharding import check_batch
from tilewright.trainer.recipe import Batch, Data, Recipe

SAMPLE = "data.sample"


def sequences_at(batch: Batch, step: int) -> int:
    """How many samples the step after `step` others takes, over all processes."""
    number = bisect_right([stage.step for stage in batch.stages], step)
    return batch.stages[number - 1].sequences if number else batch.sequences


def samples_before(batch: Batch, step: int) -> int:
    """How many samples the first `step` steps take."""
    bounds = [0, *(stage.step for stage in batch.stages if stage.step < step), step]
    return sum(sequences_at(batch, start) * (end - start) for start, end in itertools.pairwise(bounds))


def largest_batch(batch: Batch) -> int:
    """The most samples that a step takes."""
    return max([batch.sequences, *(stage.sequences for stage in batch.stages)])


def length_at(data: Data, step: int) -> int:
    """How many tokens of a sample see each other in the step after `step` others."""
    stages = data.sequence_length_stages
    number = bisect_right([stage.step for stage in stages], step)
    return stages[number - 1].length if number else data.sequence_length


def step_text(recipe: Recipe, step: int) -> str:
    """What the step after `step` others takes, and which later ones take something else."""
    whole = recipe.data.sequence_length
    text = f"{sequences_at(recipe.batch, step) * whole:,} tokens"
    if (length := length_at(recipe.data, step)) < whole:
        text += f", cut into pieces of {length:,}"
    later = {stage.step: f"{stage.sequences * whole:,} tokens" for stage in recipe.batch.stages if stage.step > step}
    for stage in recipe.data.sequence_length_stages:
        if stage.step > step:
            later[stage.step] = ", ".join(filter(None, [later.get(stage.step), f"pieces of {stage.length:,}"]))
    return "; ".join([text, *(f"after step {after:,}: {what}" for after, what in sorted(later.items()))])


def check_batches(batch: Batch, world_size: int) -> None:
    """Raise unless every stage's sequences divide into whole micro-batches on every process.

    Raises:
        TrainingError: see `check_batch`; it names the stage.
    """
    check_batch(batch.sequences, batch.micro_batch, world_size)
    for number, stage in enumerate(batch.stages):
        check_batch(stage.sequences, batch.micro_batch, world_size, key=f"batch.stages[{number}].sequences")


class DataPosition:
    """Which samples a step takes: those after the ones of the step before, however many these were.

    One integer, the first sample of the next step, is the whole position and is kept in checkpoints: the samples of
    steps that a run went back on are left behind, so it does not follow from the step alone.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch, self._step, self._sample = batch, 0, 0
        self._stored = torch.zeros((), dtype=torch.int64)

    def first_sample(self, step: int) -> int:
        """The first sample of the step after `step` others."""
        return self._sample + samples_before(self._batch, step) - samples_before(self._batch, self._step)

    def go_on(self, step: int, sample: int) -> None:
        """After `step` steps take the samples from `sample` on."""
        self._step, self._sample = step, sample

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """The tensor of a checkpoint, as it is after `step` steps."""
        return {SAMPLE: self._stored.fill_(self.first_sample(step))}

    def loaded(self, step: int, *, stored: bool) -> None:
        """Go on from the checkpoint of `step` that was read into what `state` gave.

        Args:
            stored: whether it has the tensor; an older one does not, and is of a run without stages.
        """
        self.go_on(step, int(self._stored) if stored else step * self._batch.sequences)
