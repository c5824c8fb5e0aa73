"""Settings that must stand before anything imports triton, and a tiny corpus and recipe to train with."""

import os

# Kernels run on CPU tensors in Triton's interpreter. The variable is read when a kernel is defined, so it is set before
# the first import; tests that compile for a GPU start a process of their own without it.
os.environ["TRITON_INTERPRET"] = "1"
# The interpreter works on many small arrays, which threads only slow down; and test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "juggle",
    "boxes",
    "of",
    "liquor",
    "near",
    "the",
    "old",
    "stone",
    "bridge",
]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built corpus of 40 short documents with a vocabulary of 320."""
    import random

    from tilewright.corpus import build_corpus

    source = tmp_path_factory.mktemp("source")
    random.seed(0)
    for number in range(40):
        words = random.choices(WORDS, k=random.randint(60, 160))
        (source / f"{number:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    output = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(source, output, suffixes=[".txt"], vocab_size=320, held_out_fraction=0.2)
    return output


@pytest.fixture
def tiny_recipe(tiny_corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe that trains in about a second; keyword arguments are dotted keys with ``__`` for the dot."""

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "tiny",
            "model": {
                "preset": "llama-10m", "vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1,
                "head_dim": 16, "intermediate_size": 48, "max_sequence_length": 32,
            },
            "data": {"corpus": str(tiny_corpus), "sequence_length": 32},
            "batch": {"sequences": 8, "micro_batch": 2},
            "steps": 6,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "evaluation": {"every": 3, "windows": 4},
            "checkpoints": {"every": 2, "keep": 2},
            "sample": {"prompt": "the quick", "tokens": 4},
            "compute_dtype": "float32",
            "runs": str(tmp_path / "runs"),
        }  # fmt: skip
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
