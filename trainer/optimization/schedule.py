"""Learning rate as a pure function of the step, so that a run resumed at any step uses the same."""

from __future__ import annotations

import math
from bisect import bisect_right

from tilewright.trainer.recipe import Schedule


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the recipe's learning rate is multiplied by in `step` (the first is 0) of `steps`.

    Without restarts there is one cycle, over all steps. Of a cycle of n steps, w of them warm-up, with peak p (1 in the
    first cycle, `restart_peak` in later ones) and end f (`final_fraction`), the t-th step (from 1) has

        warm-up, t ≤ w:               b + (p − b) · t / w        b: 0, or where the cycle before ended
        ``cosine`` (arXiv:1608.03983):  f + (p − f) · ½ (1 + cos π x)          x = (t − w) / (n − w)
        ``linear``:                     p + (f − p) · x
        ``warmup_stable_decay``:        p + (f − p) · max(0, t − n + d) / d      d: `decay_steps` (arXiv:2404.06395)
        ``constant``:                   p

    A restart warms up again from the low end of the cycle before and decays again over its own steps, which together
    with replayed data is what continual pretraining needs (arXiv:2403.08763).
    """
    number = bisect_right(schedule.restarts, step)
    bounds = [0, *schedule.restarts, steps]
    start, end = bounds[number], bounds[number + 1]
    warmup, peak = schedule.warmup_steps, 1.0
    if number:
        warmup = warmup if schedule.restart_warmup_steps is None else schedule.restart_warmup_steps
        peak = schedule.restart_peak
    done, length = step - start + 1, end - start
    if done <= warmup:
        base = learning_rate_factor(schedule, start - 1, steps) if number else 0.0
        return base + (peak - base) * (done / warmup)
    if schedule.kind == "constant":
        return peak
    progress = (done - warmup) / max(1, length - warmup)
    if schedule.kind == "cosine":
        return schedule.final_fraction + (peak - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "warmup_stable_decay":
        progress = max(0, done - length + schedule.decay_steps) / max(1, schedule.decay_steps)
    return peak + (schedule.final_fraction - peak) * progress
