"""When to stop a run whose held-out loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tilewright.trainer.recipe import Evaluation


def no_longer_improves(evaluations: Sequence[Mapping[str, Any]], name: str, recipe: Evaluation) -> bool:
    """Whether the last `stop_after` evaluations brought no better loss than the ones before.

    A function of the record alone, so that a run that was killed and resumed stops where it would have stopped.

    Args:
        evaluations: lines of ``metrics.jsonl``, in the order of their steps.
        name: of the evaluated set. A loss that is not finite, null in the record, is no better than any. Losses are
            compared over the same text alone, told by its tokens: a run's last, over all of it, counts for no others.
    """
    if recipe.stop_after == 0:
        return False
    best: dict[int | None, float] = {}
    since = 0
    for line in evaluations:
        result = line["eval"].get(name, {})
        loss = math.inf if result.get("loss") is None else result["loss"]
        text = result.get("tokens")
        better = loss < best.get(text, math.inf) - recipe.stop_margin
        if text in best or not best:
            since = 0 if better else since + 1
        best[text] = loss if better else best.get(text, math.inf)
    return since >= recipe.stop_after
