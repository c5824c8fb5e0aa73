"""The recipe: everything that defines a run, as typed dataclasses, read from YAML with dotted overrides.

    recipe = load_recipe("recipes/quickstart.yaml", ["--seed", "1", "--optimizer.learning_rate", "2e-3"])

Keys that no field answers to are refused with the nearest known one. What is saved beside every checkpoint is the
resolved recipe: each value stated, presets filled in.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tilewright.model import PRESETS, ModelConfig, ModelConfigError, from_preset
from tilewright.trainer.errors import TrainingError


@dataclass(frozen=True)
class Data:
    """Where the tokens come from.

    Attributes:
        corpus: folder that ``tilewright corpus build`` made.
        sequence_length: tokens in a sample.
        across_documents: whether attention may cross from one packed document into the next.
    """

    corpus: str
    sequence_length: int
    across_documents: bool = False


@dataclass(frozen=True)
class Batch:
    """How many samples make a step, over all processes, and how many a process takes at a time."""

    sequences: int
    micro_batch: int


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv:1711.05101), weight decay on matrices alone, gradients clipped to a global norm (0: not clipped)."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate over the run; see `tilewright.trainer.schedule`."""

    kind: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Held-out text, scored before the first step, then every so many steps, then at the end on all of it.

    Attributes:
        every: steps between evaluations; 0 leaves only the first and the last.
        windows: samples in each but the last one; 0 takes all.
    """

    every: int = 0
    windows: int = 0


@dataclass(frozen=True)
class Checkpoints:
    """A checkpoint every so many steps (0: only at the end or when stopped), the newest `keep` of them kept."""

    every: int = 0
    keep: int = 2


@dataclass(frozen=True)
class Sample:
    """A continuation drawn at the end of the run; an empty prompt draws none."""

    prompt: str = ""
    tokens: int = 120
    temperature: float = 0.8
    top_k: int = 50


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        name: names the run directory.
        steps: optimizer steps.
        compute_dtype: of parameters and activations in the matrix products; masters and reductions are float32.
        compile: whether the blocks and the loss go through ``torch.compile``.
        seed: of the initial values and of the order of the samples.
        runs: folder of the run directories.
        run_directory: an exact run directory; without one the trainer goes on with this recipe's unfinished run in
            `runs`, or starts the next one there.
    """

    name: str
    model: ModelConfig
    data: Data
    batch: Batch
    steps: int
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    sample: Sample = field(default_factory=Sample)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = True
    seed: int = 0
    runs: str = "runs"
    run_directory: str | None = None

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in ("", ".", ".."):
            raise TrainingError(f"name is {self.name!r}; it names the run directory, so it must be a plain file name")
        at_least = {
            "steps": 1, "data.sequence_length": 1, "batch.sequences": 1, "batch.micro_batch": 1,
            "schedule.warmup_steps": 0, "schedule.decay_steps": 0, "evaluation.every": 0, "evaluation.windows": 0,
            "checkpoints.every": 0, "checkpoints.keep": 1, "optimizer.learning_rate": 0, "optimizer.max_grad_norm": 0,
            "optimizer.eps": 0, "optimizer.weight_decay": 0, "schedule.final_fraction": 0, "seed": 0,
            "sample.tokens": 0, "sample.temperature": 0, "sample.top_k": 1,
        }  # fmt: skip
        for key, least in at_least.items():
            value = _get(self, key)
            if not least <= value < math.inf:
                raise TrainingError(f"{key} is {value}; it must be {least} or more")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise TrainingError(f"optimizer.betas is {self.optimizer.betas}; each must be at least 0 and less than 1")
        if not self.seed < 2**63:
            raise TrainingError(f"seed is {self.seed}; it must be less than 2**63")
        if self.data.sequence_length > self.model.max_sequence_length:
            raise TrainingError(
                f"data.sequence_length is {self.data.sequence_length}, more than the {self.model.max_sequence_length} "
                "positions of model.max_sequence_length; lower the one or raise the other"
            )
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise TrainingError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) and schedule.decay_steps "
                f"({self.schedule.decay_steps}) are more than steps ({self.steps}); lower them or raise steps"
            )

    def tokens_per_step(self) -> int:
        """Tokens that a step consumes, over all processes."""
        return self.batch.sequences * self.data.sequence_length


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a YAML file, or the name of a recipe that ships with Tilewright, such as ``quickstart``.
        overrides: ``--a.b VALUE`` or ``--a.b=VALUE``, each value in YAML.

    Raises:
        TrainingError: no such file, not YAML, an unknown or missing key, a value of the wrong type.
    """
    values = _parse(_text_of(source), source)
    for key, value in _pairs(overrides):
        _set(values, key, value)
    return _build(values, source)


def recipe_from_run(path: Path) -> Recipe:
    """The resolved recipe saved in a run directory.

    Raises:
        TrainingError: it is missing or damaged.
    """
    if not path.is_file():
        raise TrainingError(
            f"{path.parent} is not a run directory: it holds no {path.name}; name one that a training run made"
        )
    return _build(_parse(_read(path), str(path)), str(path))


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back to an equal one."""
    values = dataclasses.asdict(recipe)
    values["optimizer"]["betas"] = list(recipe.optimizer.betas)
    return yaml.safe_dump(values, sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with Tilewright."""
    folder = importlib.resources.files("tilewright.recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _text_of(source: str) -> str:
    if Path(source).is_file():
        return _read(Path(source))
    if source in shipped_recipes():
        return importlib.resources.files("tilewright.recipes").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    raise TrainingError(
        f"there is no recipe file {source}; name a YAML file, or a recipe that ships: {', '.join(shipped_recipes())}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TrainingError(f"{path} is not a text file in UTF-8, so it is no recipe; name another") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise TrainingError(
            f"{source} is not YAML{where}: {getattr(error, 'problem', None) or error}; mend it there"
        ) from None
    if not isinstance(values, dict):
        raise TrainingError(f"{source} holds no recipe: it must map keys such as name, model and data to values")
    return values


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(overrides)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise TrainingError(f"{flag!r} is not an override; write --a.b VALUE, as in --optimizer.learning_rate 1e-3")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise TrainingError(f"--{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        yield key, _override_value(key, value)


def _override_value(key: str, text: str) -> Any:
    """What an override says: plain text for a key whose value is text, else YAML."""
    kind: Any = Recipe
    for part in key.split("."):
        kind = _sections(typing.cast(type, kind)).get(part) if dataclasses.is_dataclass(kind) else None
    if kind is str or kind == str | None:
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise TrainingError(f"--{key} {text} is not a value; quote it as YAML would want it") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise TrainingError(f"--{key} does not fit: {parent} is a single value in the recipe, not a section")
    values[last] = value


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _build(values: dict[str, Any], source: str) -> Recipe:
    _check_keys(values, Recipe, source, extra={"model.preset"})
    values = {**values, "model": _model_values(values.get("model"))}
    _check_required(values, Recipe, source)
    return _typed(values, source)


def _model_values(model: Any) -> Any:
    """The model's section with its preset filled in; what the section states itself goes before the preset."""
    if not isinstance(model, dict) or "preset" not in model:
        return model
    if not isinstance(model["preset"], str):
        raise TrainingError(f"model.preset is {model['preset']!r}; it must be one of {', '.join(PRESETS)}")
    changes = {key: value for key, value in model.items() if key != "preset"}
    try:
        return {**dataclasses.asdict(from_preset(model["preset"])), **changes}
    except ModelConfigError as error:
        raise TrainingError(str(error)) from None


def _sections(cls: type) -> dict[str, Any]:
    """Field names of a dataclass with their types."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, kind in _sections(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _known_keys(typing.cast(type, kind), f"{prefix}{name}.")


def _check_keys(values: dict[str, Any], cls: type, source: str, extra: set[str], prefix: str = "") -> None:
    """Raise for the first key that no field answers to, with the nearest known one."""
    sections = _sections(cls)
    for key, value in values.items():
        path = f"{prefix}{key}"
        kind = sections.get(key)
        if kind is None and path not in extra:
            known = [*_known_keys(Recipe), *sorted(extra)]
            # Among the keys of this section first, where the slip most likely is.
            here = [k for k in known if k.startswith(prefix) and "." not in k[len(prefix) :]]
            near = difflib.get_close_matches(path, here, 1) or difflib.get_close_matches(path, known, 1, 0.0)
            raise TrainingError(f"unknown recipe key {path!r} in {source}; the nearest known one is {near[0]!r}")
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise TrainingError(f"{path} in {source} is {value!r}; it must be a section of keys")
            _check_keys(value, typing.cast(type, kind), source, extra, f"{path}.")


def _check_required(values: dict[str, Any], cls: type, source: str, prefix: str = "") -> None:
    sections = _sections(cls)
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in values and required:
            hint = f" or model.preset, one of {', '.join(PRESETS)}" if prefix == "model." else ""
            raise TrainingError(f"{source} has no {prefix}{f.name}; state it{hint}")
        if f.name in values and dataclasses.is_dataclass(sections[f.name]):
            _check_required(values[f.name], typing.cast(type, sections[f.name]), source, f"{prefix}{f.name}.")


def _typed(values: dict[str, Any], source: str) -> Recipe:
    """The values as a `Recipe`, each converted to its field's type."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    try:
        return typing.cast(Recipe, parser.instantiate(parser.parse_object({"recipe": values})).recipe)
    except ModelConfigError as error:
        raise TrainingError(f"{error} (in {source})") from None
    except ArgumentError as error:
        # jsonargparse says which key and type in its first two lines.
        lines = str(error).replace('Parser key "recipe.', '"').splitlines()
        raise TrainingError(f"{source} does not fit: {' '.join(line.strip() for line in lines[:2])}") from None
