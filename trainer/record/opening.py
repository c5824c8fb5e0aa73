"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tilewright.trainer.checkpoints.run_state import RunState
from tilewright.trainer.held_memory import held_bytes
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.record.quantities import gigabytes
from tilewright.trainer.stages import step_text


def opening_facts(
    recipe: Recipe, state: RunState, run: Path, *, processes: int, matmul_peak: float, elsewhere: Mapping[str, str]
) -> dict[str, str]:
    """The facts by what they are called, in the order in which they are shown.

    Args:
        run: its directory.
        processes: of this start.
        matmul_peak: FLOP/s that were measured.
        elsewhere: where else the run can be looked at, by the tracker's name.
    """
    parameters = sum(p.numel() for p in state.model.parameters())
    facts = {
        "model": f"{parameters / 1e6:.1f}M parameters, {recipe.compute_dtype}",
        "step": step_text(recipe, state.step),
        "held": _held_text(state, parameters, shards=processes // recipe.parallel.replicas),
        "matmul peak": f"{matmul_peak / 1e12:.2f} TFLOP/s, measured now",
        "run": str(run),
        **elsewhere,
    }
    if processes > 1:
        facts["processes"] = str(processes)
    if state.step:
        facts["resumed"] = f"after step {state.step}"
    if state.averaged_from:
        facts["averaged"] = f"weights from those of step {state.averaged_from} on: no average was kept before"
    return facts


def _held_text(state: RunState, parameters: int, shards: int) -> str:
    """What this process holds between steps, beside what its share should be."""
    held = held_bytes(state.model, state.optimizer)
    per_parameter = sum(held.values()) * shards / parameters
    kinds = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in held.items())
    return f"{kinds} a process: {per_parameter:.2f} bytes x parameters / {shards}"
