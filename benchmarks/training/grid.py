"""Which training steps are measured: models × sequence lengths × numbers of processes, each in several settings.

The settings of a place vary one thing at a time; all of a place are timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from tilewright.model import ModelConfig, Transformer, from_preset
from tilewright.trainer.recipe import Batch, Data, Optimizer, Recipe


class Setting(NamedTuple):
    """How a process takes its part of a step: `micro_batch` sequences at a time, `accumulation` times.

    Attributes:
        checkpointing: the mode of `tilewright.trainer.recipe.ActivationCheckpointing`. Each mode of a place has a model
            of its own; ``budget`` is the compiler's setting for all of a process, so it shares a place with no other.
    """

    micro_batch: int
    accumulation: int = 1
    checkpointing: Literal["none", "selective", "full", "budget"] = "none"
    compile: bool = False

    @property
    def sequences(self) -> int:
        """Of a process in a step."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        again = "" if self.checkpointing == "none" else f", activation checkpointing {self.checkpointing}"
        return f"micro-batch {self.micro_batch}, accumulation {self.accumulation}{again}"


class Place(NamedTuple):
    """A model at a sequence length on so many processes."""

    model: str
    sequence_length: int
    world_size: int
    settings: tuple[Setting, ...]

    def __str__(self) -> str:
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{self.model}, {self.sequence_length} tokens, {processes}"

    @property
    def modes(self) -> list[str]:
        """Of activation checkpointing, each of which has a model in memory."""
        return list(dict.fromkeys(setting.checkpointing for setting in self.settings))

    @property
    def config(self) -> ModelConfig:
        """The model, with just as many positions as are used."""
        preset, changes = MODELS[self.model]
        return from_preset(preset, **{**changes, "max_sequence_length": self.sequence_length})

    @property
    def recipe(self) -> Recipe:
        """The trainer's recipe with room for the largest setting; its tokens are random."""
        sequences = max(setting.sequences for setting in self.settings)
        return Recipe(
            name=self.model,
            model=self.config,
            data=Data(corpus="", sequence_length=self.sequence_length),
            batch=Batch(sequences=sequences * self.world_size, micro_batch=sequences),
            steps=1,
            optimizer=Optimizer(learning_rate=1e-3),
            compile=any(setting.compile for setting in self.settings),
        )


MODELS: dict[str, tuple[str, dict[str, int | bool]]] = {
    "1M": (
        "llama-10m",
        {"vocab_size": 4096, "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 32,
         "intermediate_size": 352},
    ),
    "10M": ("llama-10m", {}),
    "42M": (
        "llama-10m",
        {"vocab_size": 32000, "hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 8, "intermediate_size": 1408},
    ),
    "135M": ("smollm2-135m", {}),
    "1B": ("llama-3.2-1b", {}),
    "8B": ("llama-3-8b", {}),
}  # fmt: skip


def places(device_type: str, most_processes: int, *, quick: bool) -> Iterator[Place]:
    """What is measured on a machine.

    Args:
        device_type: "cpu" or "cuda".
        most_processes: GPUs here, or on a CPU processes that have a core each.
        quick: about a minute on two cores instead of everything.
    """
    worlds = [size for size in (1, 2, 4, 8) if size <= most_processes]
    if quick:
        settings = (Setting(4), Setting(2, 2), Setting(4, checkpointing="full"), Setting(4, compile=True))
        yield Place("1M", 256, 1, settings)
        yield from (Place("1M", 256, size, (Setting(2), Setting(1, 2))) for size in worlds[1:2])
        return
    shapes = _CUDA_SHAPES if device_type == "cuda" else _CPU_SHAPES
    for model, sequence_length, micro_batch in shapes:
        for size in worlds:
            # On a GPU, whose memory two models may not share, each mode of checkpointing is a place of its own.
            around = _around(micro_batch)
            for modes in [_MODES] if device_type == "cpu" else [[mode] for mode in _MODES]:
                yield Place(model, sequence_length, size, tuple(s for s in around if s.checkpointing in modes))
            yield Place(model, sequence_length, size, (Setting(micro_batch, checkpointing="budget", compile=True),))
            if micro_batch > 1:
                # Apart: after a second size of micro-batch Dynamo would compile for any size, which no run needs.
                half = Setting(micro_batch // 2, compile=True)
                yield Place(model, sequence_length, size, (half, half._replace(accumulation=2)))


# Model, sequence length, and the micro-batch that the settings vary around.
_CPU_SHAPES = (("10M", 256, 4), ("42M", 512, 4), ("10M", 1024, 2))
_CUDA_SHAPES = (
    ("135M", 2048, 8), ("135M", 8192, 2), ("1B", 2048, 4), ("1B", 8192, 1), ("1B", 32768, 1), ("8B", 8192, 1),
)  # fmt: skip
_MODES = ["none", "selective", "full"]


def _around(micro_batch: int) -> tuple[Setting, ...]:
    base = Setting(micro_batch, compile=True)
    return (
        base,
        base._replace(compile=False),
        base._replace(accumulation=2),
        base._replace(checkpointing="selective"),
        base._replace(checkpointing="full"),
        base._replace(checkpointing="full", compile=False),
    )


def state_bytes_needed(place: Place) -> int:
    """Bytes a process cannot do without: float32 weights, gradients and AdamW's two moments, sharded."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(place.config).parameters())
    return 16 * parameters // place.world_size
