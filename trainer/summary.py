"""What a finished run says of itself: held-out bits per byte beside what general compressors need, and a sample."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

from tilewright.trainer.recipe import Recipe
from tilewright.trainer.run_directory import SUMMARY, write_atomically
from tilewright.trainer.trained import continue_prompt


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits that ``gzip -9`` and ``xz -9`` need for each byte of `text`, compressed in one piece."""
    if not text:
        return {}
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def heldout_text(corpus: Path) -> bytes:
    """The held-out documents of a corpus folder, end to end."""
    with (corpus / "documents" / "heldout.jsonl").open(encoding="utf-8") as lines:
        return "".join(json.loads(line)["text"] for line in lines).encode()


def continuation(run: Path, recipe: Recipe) -> dict[str, str]:
    """The recipe's prompt and what the run's newest checkpoint makes of it; empty without a prompt."""
    sample = recipe.sample
    if not sample.prompt:
        return {}
    text = continue_prompt(
        run,
        sample.prompt,
        max_new_tokens=sample.tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        seed=recipe.seed,
    )
    return {"prompt": sample.prompt, "continuation": text}


def write_summary(run: Path, facts: dict[str, Any]) -> None:
    """Record `facts` as ``summary.json``."""
    write_atomically(run / SUMMARY, json.dumps(facts, indent=1))
