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
        name: of the evaluated set. A loss that is not finite, null in the record, is no better than any. Nor is one
            over other text than the one before it, as a run's last is over all of it; later ones compare with it.
    """
    if recipe.stop_after == 0:
        return False
    best, tokens, since = math.inf, None, 0
    for line in evaluations:
        result = line["eval"].get(name, {})
        loss = math.inf if result.get("loss") is None else result["loss"]
        same_text = tokens in (None, result.get("tokens"))
        better = same_text and loss < best - recipe.stop_margin
        best = loss if better or not same_text else best
        tokens, since = result.get("tokens"), 0 if better else since + 1
    return since >= recipe.stop_after
