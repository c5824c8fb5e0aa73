"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from tilewright.trainer.recipe import Schedule


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the recipe's learning rate is multiplied by in `step` (the first is 0) of `steps`.

    Warm-up rises linearly over `warmup_steps`, the first step already above 0. Then ``cosine`` (arXiv:1608.03983) falls
    along half a cosine to `final_fraction` at the last step; ``warmup_stable_decay`` (arXiv:2404.06395) stays at 1 and
    falls linearly over the last `decay_steps`; ``constant`` stays.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps + 1) / max(1, steps - schedule.warmup_steps)
        return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "warmup_stable_decay" and step >= steps - schedule.decay_steps:
        progress = (step - (steps - schedule.decay_steps) + 1) / schedule.decay_steps
        return 1.0 + (schedule.final_fraction - 1.0) * progress
    return 1.0
