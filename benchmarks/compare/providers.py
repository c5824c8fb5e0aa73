"""Who is compared: one line each.

A provider is a script of this folder and its options. It runs in Tilewright's own environment, or in that of the
peers, which ``make compare`` builds from `REQUIREMENTS`. It prints what `step_log.StepLog` prints, and nothing else of
it is known here.
"""

from __future__ import annotations

from typing import NamedTuple


class Provider(NamedTuple):
    """A script and its options; `peer` ones run in the peers' environment."""

    script: str
    options: tuple[str, ...]
    peer: bool


PROVIDERS = {
    "tilewright": Provider("train_tilewright.py", (), False),
    "transformers eager, autocast": Provider("train_transformers.py", ("--dtype", "autocast"), True),
    "transformers compiled, autocast": Provider("train_transformers.py", ("--dtype", "autocast", "--compile"), True),
    "transformers eager, bfloat16": Provider("train_transformers.py", ("--dtype", "bfloat16"), True),
    "transformers compiled, bfloat16": Provider("train_transformers.py", ("--dtype", "bfloat16", "--compile"), True),
}

# Whose losses the others' are held to: the same steps without rounding to bfloat16, taken once and not timed.
EXACT = Provider("train_transformers.py", ("--dtype", "float32"), True)

# What the peers' environment holds, at the versions of constraints.txt.
REQUIREMENTS = ("torch", "transformers", "numpy", "safetensors")
