"""Tilewright's provider: the step that ``tilewright train`` takes by default, on given weights and tokens.

    python train_tilewright.py FOLDER STEPS

FOLDER holds `model.json`, `tokens.npy` (steps, sequences, length + 1) and `settings.json`, as `compare.py` prepares it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from step_log import StepLog  # type: ignore[import-not-found]

from tilewright.trainer.host_memory import spare_triton

spare_triton()  # as `tilewright train` does, before anything imports it

from tilewright.corpus import Batch  # noqa: E402
from tilewright.model.config import ModelConfig  # noqa: E402
from tilewright.trainer.build import build  # noqa: E402
from tilewright.trainer.parallel.sharding import world  # noqa: E402
from tilewright.trainer.recipe import Batch as BatchSizes  # noqa: E402
from tilewright.trainer.recipe import Data, Optimizer, Recipe  # noqa: E402
from tilewright.trainer.step import MicroBatch, train_step  # noqa: E402


def main() -> None:
    """Take the steps."""
    log = StepLog()
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    config = ModelConfig(**json.loads((folder / "model.json").read_text()))
    tokens = np.load(folder / "tokens.npy")
    sequences, length = tokens.shape[1], tokens.shape[2] - 1
    recipe = Recipe(  # what a recipe leaves out takes the trainer's defaults, compilation and dtype among them
        name="compare",
        model=config,
        data=Data(corpus="", sequence_length=length),
        batch=BatchSizes(sequences=sequences, micro_batch=sequences),
        steps=steps,
        optimizer=Optimizer(**settings["optimizer"]),
        seed=settings["seed"],
    )
    # Each row is one document.
    starts = np.arange(sequences + 1, dtype=np.int32) * length
    with world() as processes:
        model, optimizer, _ = build(recipe, processes)
        for step in range(steps):
            rows = tokens[step].astype(np.int64)
            batch = Batch(inputs=rows[:, :-1].copy(), targets=rows[:, 1:].copy(), cu_seqlens=starts)
            micro = MicroBatch.of(batch, processes.device, across_documents=recipe.data.across_documents)
            result = train_step(model, optimizer, [micro], processes, max_grad_norm=recipe.optimizer.max_grad_norm)
            log.step(result.loss)
    log.end()


if __name__ == "__main__":
    main()
