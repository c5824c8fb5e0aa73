"""Opens simulated corpora of up to ten trillion tokens and times what a training run asks of them.

    .venv/bin/python benchmarks/corpus_scale.py

Every shard is 1 GB of two-byte tokens that the file system does not store (a sparse file), with a true index of a
document every thousand tokens. Each size is opened by a process of its own, whose peak memory is that of opening and
reading. What sparse files cannot show is what a disk or a network takes to seek.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_PER_SHARD = 500_000_000
TOKENS_PER_DOCUMENT = 1000
SHARDS = (20, 2_000, 20_000)
SEQUENCE_LENGTH, SEQUENCES, BATCHES = 2048, 64, 50

MOST_SECONDS, MOST_BYTES = 5.0, 300e6


def write_simulated_shards(folder: Path, shards: int) -> None:
    """Shards `TOKENS_PER_SHARD` long in datatrove's layout; the indexes, which are equal, are links to one file."""
    folder.mkdir(parents=True)
    index = folder / "index"
    np.arange(TOKENS_PER_DOCUMENT, TOKENS_PER_SHARD + 1, TOKENS_PER_DOCUMENT, dtype="<u8").tofile(index)
    for number in range(shards):
        path = folder / f"{number:05d}.ds"
        with path.open("wb") as tokens:
            tokens.truncate(2 * TOKENS_PER_SHARD)
        os.link(index, folder / f"{path.name}.index")
        (folder / f"{path.name}.metadata").write_text(f"simulated|2\n{TOKENS_PER_SHARD}\n500 MT")


def measure(folder: Path) -> dict[str, float]:
    """Open the shards of a folder in a fresh process and read random batches; see `_opened` for the figures."""
    done = subprocess.run(
        [sys.executable, __file__, "--opened", str(folder)], capture_output=True, text=True, check=True, timeout=600
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _opened(folder: str) -> dict[str, Any]:
    from tilewright.corpus import Split, TrainStream

    # Linux counts in KiB; a process starts with the peak of the one it was forked from.
    Path("/proc/self/clear_refs").write_text("5")
    imported = _peak_bytes()
    started = time.perf_counter()
    split = Split(folder, end_of_text=0, vocab_size=50_000)
    stream = TrainStream(split, sequence_length=SEQUENCE_LENGTH, seed=0)
    seconds = time.perf_counter() - started
    opened = _peak_bytes()
    times = []
    for step in range(BATCHES):
        started = time.perf_counter()
        stream.batch(range(step * SEQUENCES, (step + 1) * SEQUENCES))
        times.append(time.perf_counter() - started)
    return {
        "tokens": split.token_count,
        "open_seconds": seconds,
        "batch_seconds": statistics.median(times),
        "imported_bytes": imported,
        "opened_bytes": opened,
        "read_bytes": _peak_bytes(),
        "open_files": len(os.listdir("/proc/self/fd")),
    }


def _peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def main() -> int:
    """Print a row for each size; the exit status says whether the largest stays within the bars."""
    root = Path(tempfile.mkdtemp(prefix="corpus-scale-"))
    print("shards  tokens    open, s  a batch, ms  peak memory, MB: imported  opened  50 batches read  files open")
    try:
        for shards in SHARDS:
            write_simulated_shards(root / str(shards), shards)
            figures = measure(root / str(shards))
            memory = [figures[f"{when}_bytes"] / 1e6 for when in ("imported", "opened", "read")]
            print(
                f"{shards:>6,}  {figures['tokens'] / 1e12:>5.2f} T  {figures['open_seconds']:>8.3f}"
                f"{1e3 * figures['batch_seconds']:>13.2f}{memory[0]:>27.0f}{memory[1]:>8.0f}{memory[2]:>17.0f}"
                f"{figures['open_files']:>12}",
                flush=True,
            )
    finally:
        shutil.rmtree(root)
    kept = figures["open_seconds"] < MOST_SECONDS and figures["read_bytes"] < MOST_BYTES
    print(f"bars: {MOST_SECONDS:.0f} s to open, {MOST_BYTES / 1e6:.0f} MB: {'kept' if kept else 'broken'}")
    return 0 if kept else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--opened"]:
        print(json.dumps(_opened(sys.argv[2])))
    else:
        sys.exit(main())
