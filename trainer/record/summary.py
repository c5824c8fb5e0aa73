"""What a finished run says of itself: held-out bits per byte beside what general compressors need, and a sample."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright.trainer.data import HELDOUT, HELDOUT_AVERAGED, TrainingData
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.health.rollback import recorded_rollbacks
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.metrics import METRICS, read_metrics
from tilewright.trainer.record.quantities import duration, short
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
    """The held-out documents of a corpus folder, end to end; none where it holds token shards alone.

    Raises:
        TrainingError: the file that holds them is damaged.
    """
    path = corpus / "documents" / "heldout.jsonl"
    if not path.exists():
        return b""
    try:
        with path.open(encoding="utf-8") as lines:
            return "".join(json.loads(line)["text"] for line in lines).encode()
    except (ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{path} is damaged; bring it back from a copy, then give the same command again: the model is saved"
        ) from None


def heldout_facts(scores: Mapping[str, float], corpora: Sequence[Path]) -> dict[str, float]:
    """The scores of all held-out text, its bytes, and what compressors make of it where it is there as text."""
    texts = [heldout_text(corpus) for corpus in corpora]
    if all(texts):
        text = b"".join(texts)
        return {**scores, **compressed_bits_per_byte(text), "bytes": len(text)}
    bits = scores["loss"] * scores["tokens"] / math.log(2)
    return {**scores, "bytes": round(bits / scores["bits_per_byte"])}


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


def finished_facts(
    run: Path,
    recipe: Recipe,
    data: TrainingData,
    results: Mapping[str, Mapping[str, float]],
    *,
    step: int,
    tokens: int,
    parameters: int,
    matmul_peak: float,
    stopped_early: bool,
) -> dict[str, Any]:
    """What became of a run that has come to its end.

    Args:
        results: of the last evaluation, by name.
        step: the last one.
        tokens: that were read for training.
        matmul_peak: FLOP/s that were measured.
    """
    return {
        "name": recipe.name,
        "status": "finished",
        "steps": step,
        "tokens": tokens,
        "seconds": seconds_in_steps(run, recipe),
        "parameters": parameters,
        "matmul_peak_flops": matmul_peak,
        "heldout": heldout_facts(results[HELDOUT], [corpus.folder for corpus in data.corpora.values()]),
        "heldout_sources": {name: results[name] for name in data.corpora if name != HELDOUT},
        "heldout_averaged": results.get(HELDOUT_AVERAGED, {}),
        "stopped_early": stopped_early,
        "rollbacks": len(recorded_rollbacks(run)),
        "sample": continuation(run, recipe),
        "step_seconds": step_seconds(run, recipe),
    }


def seconds_in_steps(run: Path, recipe: Recipe) -> float:
    """The time that a run's optimizer steps took, over all its resumptions; evaluation and pauses not counted."""
    return sum(_seconds_of(line, recipe) for line in read_metrics(run / METRICS)[0])


def step_seconds(run: Path, recipe: Recipe) -> dict[str, float]:
    """The median time of a step, of those that began while a checkpoint was being written and of the others; those that
    a profiler slowed down are left out."""
    seconds: dict[str, list[float]] = {"checkpoint_in_flight": [], "otherwise": []}
    for line in read_metrics(run / METRICS)[0]:
        if (taken := _seconds_of(line, recipe)) and not line.get("profiled"):
            seconds["checkpoint_in_flight" if line.get("checkpoint_in_flight") else "otherwise"].append(taken)
    return {kind: statistics.median(times) for kind, times in seconds.items() if times}


def _seconds_of(line: Mapping[str, Any], recipe: Recipe) -> float:
    """The time of a recorded step; 0 where that is not known."""
    rate = line.get("tokens_per_second")
    # A line that does not say how many is of a version that knew no stages.
    sequences = line.get("sequences", recipe.batch.sequences)
    return float(sequences * recipe.data.sequence_length / rate) if rate else 0.0


def closing_text(facts: dict[str, Any]) -> str:
    """What is shown at the end of a run, from what `write_summary` records."""
    heldout, sample = facts["heldout"], facts["sample"]
    rows = [("this model", heldout["bits_per_byte"])]
    if facts["heldout_averaged"]:
        rows.append(("averaged", facts["heldout_averaged"]["bits_per_byte"]))
    rows += [(f"  on {name}", scores["bits_per_byte"]) for name, scores in facts["heldout_sources"].items()]
    rows += [
        (f"{name} -9", heldout[f"{name}_bits_per_byte"])
        for name in ("xz", "gzip")
        if f"{name}_bits_per_byte" in heldout
    ]
    lines = [
        f"\ntrained on {short(facts['tokens'])} tokens in {facts['steps']:,} steps, {duration(facts['seconds'])}",
        f"\nbits per byte of held-out text ({heldout['bytes']:,} bytes that were not trained on)",
        *(f"  {name:<{max(10, *(len(name) for name, _ in rows))}}  {bits:.3f}" for name, bits in rows),
    ]
    if len(times := facts["step_seconds"]) == 2:
        lines.append(
            f"\na step took {1e3 * times['checkpoint_in_flight']:,.0f} ms while a checkpoint was being written and "
            f"{1e3 * times['otherwise']:,.0f} ms otherwise (medians)"
        )
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
