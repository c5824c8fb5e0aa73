"""What a finished run says of itself: held-out bits per byte beside what general compressors need, and a sample."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

from tilewright.trainer.errors import TrainingError
from tilewright.trainer.quantities import duration, short
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
    """The held-out documents of a corpus folder, end to end.

    Raises:
        TrainingError: the file that holds them is damaged.
    """
    path = corpus / "documents" / "heldout.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            return "".join(json.loads(line)["text"] for line in lines).encode()
    except (ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{path} is damaged; bring it back from a copy, then give the same command again: the model is saved"
        ) from None


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


def closing_text(facts: dict[str, Any]) -> str:
    """What is shown at the end of a run, from what `write_summary` records."""
    heldout, sample = facts["heldout"], facts["sample"]
    rows = [("this model", heldout["bits_per_byte"])]
    rows += [
        (f"{name} -9", heldout[f"{name}_bits_per_byte"])
        for name in ("xz", "gzip")
        if f"{name}_bits_per_byte" in heldout
    ]
    lines = [
        f"\ntrained on {short(facts['tokens'])} tokens in {facts['steps']:,} steps, {duration(facts['seconds'])}",
        f"\nbits per byte of held-out text ({heldout['bytes']:,} bytes that were not trained on)",
        *(f"  {name:<10}  {bits:.3f}" for name, bits in rows),
    ]
    if sample:
        lines += [
            "\na continuation, drawn by the model after the prompt's last line:",
            "",
            sample["prompt"].rstrip("\n"),
        ]
        lines.append(sample["continuation"].strip("\n") if sample["prompt"].endswith("\n") else sample["continuation"])
    return "\n".join(lines)


def write_summary(run: Path, facts: dict[str, Any]) -> None:
    """Record `facts` as ``summary.json``."""
    write_atomically(run / SUMMARY, json.dumps(facts, indent=1))
