"""What a recipe must hold to: the range of each value, and what does not fit together."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any

from tilewright.corpus import CorpusError, whole_shares
from tilewright.trainer.errors import TrainingError

if TYPE_CHECKING:
    from tilewright.trainer.recipe import ActivationCheckpointing, Data, Optimizer, Recipe, Schedule


def check_recipe(recipe: Recipe) -> None:
    """Raise for the first value that cannot be.

    Raises:
        TrainingError: it names the key, what it is and what it must be.
    """
    if "/" in recipe.name or recipe.name in ("", ".", ".."):
        raise TrainingError(f"name is {recipe.name!r}; it names the run directory, so it must be a plain file name")
    _check_ranges(recipe)
    if not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise TrainingError(f"optimizer.betas is {recipe.optimizer.betas}; each must be at least 0 and less than 1")
    _check_sources(recipe.data)
    _check_stages(recipe)
    _check_optimizer(recipe.optimizer)
    _check_schedule(recipe.schedule, recipe.steps)
    if recipe.evaluation.stop_after and not recipe.evaluation.every:
        raise TrainingError(
            f"evaluation.stop_after is {recipe.evaluation.stop_after} and evaluation.every 0, so there is nothing to "
            "stop by; set evaluation.every"
        )
    _check_folders(recipe)
    _check_checkpoints(recipe)
    _check_activations(recipe.activation_checkpointing, compiled=recipe.compile)
    _check_seen(recipe)
    _check_float8(recipe)
    try:
        recipe.sample.prompt.encode()
    except UnicodeEncodeError:
        raise TrainingError(
            f"sample.prompt is {recipe.sample.prompt!r}, which is not text; write it in UTF-8"
        ) from None
    if not recipe.seed < 2**63:
        raise TrainingError(f"seed is {recipe.seed}; it must be less than 2**63")
    if recipe.data.sequence_length > recipe.model.max_sequence_length:
        raise TrainingError(
            f"data.sequence_length is {recipe.data.sequence_length}, more than the {recipe.model.max_sequence_length} "
            "positions of model.max_sequence_length; lower the one or raise the other"
        )


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_ranges(recipe: Recipe) -> None:
    at_least = {
        "steps": 1, "data.sequence_length": 1, "batch.sequences": 1, "batch.micro_batch": 1,
        "schedule.warmup_steps": 0, "schedule.decay_steps": 0, "evaluation.every": 0, "evaluation.windows": 0,
        "evaluation.stop_after": 0, "evaluation.stop_margin": 0, "schedule.restart_peak": 0,
        "checkpoints.every": 0, "checkpoints.keep": 1, "checkpoints.keep_every": 0,
        "optimizer.learning_rate": 0, "optimizer.max_grad_norm": 0,
        "optimizer.eps": 0, "optimizer.weight_decay": 0, "schedule.final_fraction": 0, "seed": 0,
        "sample.tokens": 0, "sample.temperature": 0, "sample.top_k": 1, "parallel.replicas": 1,
        "health.hang_minutes": 0, "health.stop_seconds": 0, "health.slow_rank": 0,
        "parallel.prefetch": 0, "activation_checkpointing.budget": 0, "data.prefetch": 0,
        "health.rollbacks": 1, "health.bad_steps": 1, "health.spike_score": 0, "health.spike_window": 4,
    }  # fmt: skip
    for key, least in at_least.items():
        value = _get(recipe, key)
        if not least <= value < math.inf:
            raise TrainingError(f"{key} is {value}; it must be {least} or more")
    if recipe.data.prefetch > 1024:
        raise TrainingError(
            f"data.prefetch is {recipe.data.prefetch} steps, all of which are held in memory; set it to 1024 at most"
        )


def _check_sources(data: Data) -> None:
    if not data.sources:
        return
    if data.corpus or data.heldout:
        given = "data.corpus" if data.corpus else "data.heldout"
        raise TrainingError(f"{given} and data.sources are both given; give one, or each source its own under sources")
    for name in (names := data.source_names()):
        if name in ("", "heldout", "heldout_averaged") or "/" in name or names.count(name) > 1:
            raise TrainingError(
                f"data.sources names {', '.join(map(repr, names))}; give each a name of its own, without '/', other "
                "than heldout, which stands for all of them"
            )
    try:
        whole_shares([source.weight for source in data.sources])
    except CorpusError as error:
        raise TrainingError(f"data.sources does not fit: {error}") from None


def _check_folders(recipe: Recipe) -> None:
    for key in ("runs", "run_directory", "checkpoints.folder"):
        folder = _get(recipe, key) or ""
        if folder.startswith("~"):
            raise TrainingError(f"{key} is {folder}, whose ~ nothing here stands for; write the whole path")
        if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", folder):
            raise TrainingError(
                f"{key} is {folder}, which is no URL, and as a path would be a folder named "
                f"{folder.partition('/')[0]}; write {folder.replace(':/', '://', 1)}, or ./ before it"
            )
    if recipe.checkpoints.folder.startswith("memory:"):
        raise TrainingError(
            f"checkpoints.folder is {recipe.checkpoints.folder}, which ends with the process; name a folder that stays"
        )


def _check_checkpoints(recipe: Recipe) -> None:
    # A password may hold a slash; what follows a colon and is a number up to the first slash is a port.
    port = r"(?:\[[^]]*\](?::\d+)?|[^/@:]*:\d+)(?:/|$)"
    if re.search(rf"://(?!{port})[^/@]*:.*@", recipe.checkpoints.folder):
        raise TrainingError(
            "checkpoints.folder is a URL with a user and a password, which would be shown wherever the recipe is; give "
            "them in the environment or in fsspec's configuration instead"
        )
    together = math.lcm(recipe.evaluation.every, recipe.checkpoints.every)
    if recipe.checkpoints.keep_best and not 0 < together < recipe.steps:
        raise TrainingError(
            f"checkpoints.keep_best is true, but no step before the last is both evaluated (evaluation.every "
            f"{recipe.evaluation.every}) and saved (checkpoints.every {recipe.checkpoints.every}); set both to the same"
        )
    if recipe.health.spike == "rollback" and not recipe.checkpoints.every:
        raise TrainingError(
            "health.spike is 'rollback' and checkpoints.every 0, so there is no checkpoint to go back to; set "
            "checkpoints.every"
        )


def _check_activations(checkpointing: ActivationCheckpointing, compiled: bool) -> None:
    if checkpointing.budget > 1:
        raise TrainingError(f"activation_checkpointing.budget is {checkpointing.budget}; it must be between 0 and 1")
    if checkpointing.mode == "budget" and not compiled:
        raise TrainingError(
            "activation_checkpointing.mode is 'budget', which the compiler keeps to, and compile is false; "
            "set compile to true or take another mode"
        )


def _check_stages(recipe: Recipe) -> None:
    for key, first, stages in (
        ("batch.stages", 1, recipe.batch.stages),
        ("data.sequence_length_stages", 0, recipe.data.sequence_length_stages),
    ):
        steps = [stage.step for stage in stages]
        if sorted(set(steps)) != steps or any(step < first for step in steps):
            raise TrainingError(f"{key} begin at the steps {steps}; these must be {first} or more, and rising")
    for number, stage in enumerate(recipe.batch.stages):
        if stage.sequences < 1:
            raise TrainingError(f"batch.stages[{number}].sequences is {stage.sequences}; it must be 1 or more")
    whole = recipe.data.sequence_length
    for number, cut in enumerate(recipe.data.sequence_length_stages):
        if cut.length < 1 or whole % cut.length:
            fitting = [length for length in range(1, whole + 1) if whole % length == 0]
            nearest = min(fitting, key=lambda length: (abs(length - cut.length), length))
            raise TrainingError(
                f"data.sequence_length_stages[{number}].length is {cut.length}, which does not divide "
                f"data.sequence_length ({whole}); set it to {nearest}"
            )


def _check_seen(recipe: Recipe) -> None:
    for step in recipe.profile.steps:
        if not 1 <= step <= recipe.steps:
            raise TrainingError(f"profile.steps names step {step}; this run has the steps 1 to {recipe.steps}")
    for rank in recipe.profile.ranks:
        if rank < 0:
            raise TrainingError(f"profile.ranks names process {rank}; they are counted from 0")
    if not recipe.tracking.project.strip():
        raise TrainingError("tracking.project is empty; it must name a project, such as tilewright")


def _check_float8(recipe: Recipe) -> None:
    if recipe.float8 == "none":
        return
    if recipe.compute_dtype != "bfloat16":
        raise TrainingError(
            f"float8 is {recipe.float8!r} and compute_dtype {recipe.compute_dtype!r}; set compute_dtype to bfloat16, "
            "or float8 to none"
        )
    tokens = recipe.batch.micro_batch * recipe.data.sequence_length
    if tokens % 16:
        raise TrainingError(
            f"float8 is {recipe.float8!r}, which takes micro-batches whose tokens 16 divides, and batch.micro_batch x "
            f"data.sequence_length is {tokens}; change one of them, or set float8 to none"
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    for key in ("momentum", "ema_decay"):
        if not 0 <= (value := getattr(optimizer, key)) < 1:
            raise TrainingError(f"optimizer.{key} is {value}; it must be at least 0 and less than 1")
    if optimizer.kind == "sgd" and optimizer.implementation != "auto":
        raise TrainingError(
            f"optimizer.implementation is {optimizer.implementation!r}, which is of AdamW, and optimizer.kind 'sgd'; "
            "set optimizer.implementation to auto"
        )
    if optimizer.state_dtype != "float32" and optimizer.implementation in ("torch", "apex"):
        raise TrainingError(
            f"optimizer.implementation is {optimizer.implementation!r}, which keeps AdamW's averages in float32, and "
            f"optimizer.state_dtype {optimizer.state_dtype!r}; set this to float32, or that to auto"
        )
    for number, group in enumerate(optimizer.groups):
        for key in ("learning_rate_factor", "weight_decay"):
            value = getattr(group, key)
            if value is not None and not 0 <= value < math.inf:
                raise TrainingError(f"optimizer.groups[{number}].{key} is {value}; it must be 0 or more")
        try:
            re.compile(group.match)
        except re.error as error:
            raise TrainingError(
                f"optimizer.groups[{number}].match is {group.match!r}, which is no regular expression: {error}"
            ) from None


def _check_schedule(schedule: Schedule, steps: int) -> None:
    bounds = [0, *schedule.restarts, steps]
    if sorted(set(bounds)) != bounds:
        raise TrainingError(
            f"schedule.restarts is {schedule.restarts}; it must be rising steps after 0 and before steps ({steps})"
        )
    again = schedule.warmup_steps if schedule.restart_warmup_steps is None else schedule.restart_warmup_steps
    if again < 0:
        raise TrainingError(f"schedule.restart_warmup_steps is {again}; it must be 0 or more")
    if schedule.warmup_steps + schedule.decay_steps > bounds[1]:
        end = "the first of schedule.restarts" if schedule.restarts else "steps"
        raise TrainingError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.decay_steps ({schedule.decay_steps}) are "
            f"more than {end} ({bounds[1]}); lower them or raise {end}"
        )
    shortest = min((end - start for start, end in itertools.pairwise(bounds[1:])), default=None)
    if shortest is not None and again + schedule.decay_steps > shortest:
        raise TrainingError(
            f"the warm-up of a restart ({again}) and schedule.decay_steps ({schedule.decay_steps}) are more than the "
            f"{shortest} steps from one of schedule.restarts to the next or to the end; lower them or move the restarts"
        )
