"""The recipe: everything that defines a run, as typed dataclasses, read from YAML with dotted overrides.

    recipe = load_recipe("recipes/quickstart.yaml", ["--seed", "1", "--optimizer.learning_rate", "2e-3"])

Keys that no field answers to are refused with the nearest known one. What is saved beside every checkpoint is the
resolved recipe: each value stated, presets filled in.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import itertools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tilewright.corpus import CorpusError, whole_shares
from tilewright.model import PRESETS, ModelConfig, ModelConfigError, from_preset
from tilewright.trainer.errors import TrainingError


@dataclass(frozen=True)
class Source:
    """One of several sources of tokens.

    Attributes:
        corpus, heldout: as in `Data`.
        weight: its share of the samples, relative to the others' weights: 0.7 beside 0.3, or 7 beside 3.
        name: what its held-out text is called in the metrics; by default the name of the folder. It also shuffles the
            source, so that it gives the same samples in the same order whatever it is mixed with.
    """

    corpus: str
    weight: float
    name: str = ""
    heldout: str = ""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from: `corpus`, or several `sources` in fixed proportions.

    Attributes:
        corpus: folder that ``tilewright corpus build`` made, or one of token shards in datatrove's layout.
        sources: several such folders; all made with one tokenizer.
        tokenizer: for shards in datatrove's layout, the tokenizer.json that they were made with.
        end_of_text: for such shards, the token that ends a document.
        heldout: for such shards, the folder of others to evaluate on.
        sequence_length: tokens in a sample.
        across_documents: whether attention may cross from one packed document into the next.
        prefetch: steps whose batches are read ahead, in threads; 0 reads each when it is its turn.
    """

    corpus: str = ""
    sources: list[Source] = field(default_factory=list)
    tokenizer: str = ""
    end_of_text: str = "<|endoftext|>"
    heldout: str = ""
    sequence_length: int
    across_documents: bool = False
    prefetch: int = 4

    def source_names(self) -> list[str]:
        """What each of `sources` is called."""
        return [source.name or Path(source.corpus).name for source in self.sources]


@dataclass(frozen=True)
class Batch:
    """How many samples make a step, over all processes, and how many a process takes at a time."""

    sequences: int
    micro_batch: int


@dataclass(frozen=True)
class ParameterGroup:
    """Options of the parameters that a rule matches.

    Attributes:
        match: regular expression, searched for in names such as ``blocks.3.mlp.down.weight``.
        learning_rate_factor: multiplies the learning rate.
        weight_decay: in place of what these parameters would get; None leaves that.
    """

    match: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """How gradients become steps; see `tilewright.trainer.optimizer`.

    Attributes:
        learning_rate: at the schedule's peak.
        kind: ``adamw`` (arXiv:1711.05101); ``muon`` for the matrices of the blocks and AdamW for the rest, at the same
            learning rate; ``sgd`` with momentum.
        implementation: of AdamW: ``torch``, fused; ``tilewright``, the kernel; ``apex``, NVIDIA's; ``auto`` is torch's.
        betas, eps: of AdamW.
        momentum: of Muon and SGD.
        orthogonalisation_dtype: what Muon sends and orthogonalises matrices in.
        weight_decay: of matrices; norms, biases and embeddings have none unless a group says so. Decoupled, but for
            SGD, where it is added to the gradient.
        max_grad_norm: gradients are clipped to this global norm; 0 leaves them.
        groups: rules for parameters by name; the first that matches a name holds for it.
        ema_decay: of an average of the weights, kept in float32 beside them and evaluated at the end; 0 keeps none.
    """

    learning_rate: float
    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    implementation: Literal["auto", "torch", "tilewright", "apex"] = "auto"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    orthogonalisation_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    groups: list[ParameterGroup] = field(default_factory=list)
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate over the run; see `tilewright.trainer.schedule`.

    Attributes:
        kind: the curve after the warm-up.
        warmup_steps: of the beginning.
        decay_steps: of ``warmup_stable_decay``.
        final_fraction: of the learning rate, where a curve that falls ends.
        restarts: steps after which a new warm-up and curve begin, for continual training.
        restart_warmup_steps: of each restart; None takes `warmup_steps`.
        restart_peak: fraction of the learning rate that a restart warms up to.
    """

    kind: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1
    restarts: list[int] = field(default_factory=list)
    restart_warmup_steps: int | None = None
    restart_peak: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out text, scored before the first step, then every so many steps, then at the end on all of it.

    Attributes:
        every: steps between evaluations; 0 leaves only the first and the last.
        windows: samples in each but the last one; 0 takes all.
        stop_after: the run ends after so many evaluations in a row without a better held-out loss; 0: never.
        stop_margin: nats a token by which a loss must be lower than the best before it to count as better.
    """

    every: int = 0
    windows: int = 0
    stop_after: int = 0
    stop_margin: float = 0.0


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are taken and which of them stay.

    Attributes:
        every: steps between them; 0: only at the end or when stopped.
        keep: the newest so many stay.
        keep_every: those of a step that this divides stay for ever; 0: none do.
        keep_best: whether the one with the lowest held-out loss stays, of those whose step was evaluated.
        asynchronous: whether training goes on while one is written, for the price of a copy of the state in host
            memory: with AdamW 12 bytes × parameters ÷ the processes that they are sharded over, in each process.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: bool = False
    asynchronous: bool = True


@dataclass(frozen=True)
class Parallel:
    """How the processes share the model and the work of a step.

    Attributes:
        replicas: groups of processes that each hold a whole model, sharded over the group (HSDP); 1 shards one model
            over all processes (FSDP). More replicas take more memory and gather within a group alone.
        reshard_after_forward: whether a block's gathered weights are freed between its forward and its backward pass,
            which costs a second gather and saves the compute dtype's bytes × all parameters.
        reduce: when the gradients of a step with several micro-batches are reduced: ``last`` once a step, while each
            process adds up whole gradients in float32 (4 bytes × all parameters); ``every`` after each micro-batch,
            which sends that many times as much and keeps sharded gradients alone. Replicas are always reduced once.
        offload: whether weights, gradients and optimizer state live in host memory; for a GPU.
        prefetch: blocks whose weights are gathered ahead of the one that computes.
    """

    replicas: int = 1
    reshard_after_forward: bool = True
    reduce: Literal["last", "every"] = "last"
    offload: bool = False
    prefetch: int = 1


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Which activations of a block are kept for its backward pass, and which computed again.

    Attributes:
        mode: ``none`` keeps what autograd keeps; ``full`` the block's input alone; ``selective`` the results of the ops
            in `keep`; ``budget`` what a compiled block can keep within `budget`; ``auto`` is ``selective`` where blocks
            are compiled for a CPU, which is faster there, else ``none``.
        keep: ``matmul``, ``attention`` or another kernel, such as ``rms_norm``, where it runs as a kernel.
        budget: share of the memory that ``none`` would take, 0 to 1.
    """

    mode: Literal["auto", "none", "selective", "full", "budget"] = "auto"
    keep: list[str] = field(default_factory=lambda: ["matmul", "attention"])
    budget: float = 0.5


@dataclass(frozen=True)
class Health:
    """What is done about steps that go wrong; a step whose gradient is not finite is always skipped.

    Attributes:
        bad_steps: so many skipped in a row stop the run.
        spike: what to do about a spike of the loss: ``warn`` and go on, ``skip`` the step, or ``none``.
        spike_score: how far above the median of the last losses a spike is, in robust standard deviations.
        spike_window: steps whose losses count; a quarter of them must be there before anything is a spike.
        hang_minutes: without a step or an evaluated batch for so long, every process writes where it stands and ends;
            0 never does.
    """

    bad_steps: int = 3
    spike: Literal["warn", "skip", "none"] = "warn"
    spike_score: float = 10.0
    spike_window: int = 128
    hang_minutes: float = 60.0


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
            float16 is for GPUs without bfloat16; its loss is scaled dynamically.
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
    parallel: Parallel = field(default_factory=Parallel)
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    health: Health = field(default_factory=Health)
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
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
            "evaluation.stop_after": 0, "evaluation.stop_margin": 0, "schedule.restart_peak": 0,
            "checkpoints.every": 0, "checkpoints.keep": 1, "checkpoints.keep_every": 0,
            "optimizer.learning_rate": 0, "optimizer.max_grad_norm": 0,
            "optimizer.eps": 0, "optimizer.weight_decay": 0, "schedule.final_fraction": 0, "seed": 0,
            "sample.tokens": 0, "sample.temperature": 0, "sample.top_k": 1, "parallel.replicas": 1,
            "parallel.prefetch": 0, "activation_checkpointing.budget": 0, "data.prefetch": 0,
        }  # fmt: skip
        for key, least in at_least.items():
            value = _get(self, key)
            if not least <= value < math.inf:
                raise TrainingError(f"{key} is {value}; it must be {least} or more")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise TrainingError(f"optimizer.betas is {self.optimizer.betas}; each must be at least 0 and less than 1")
        _check_sources(self.data)
        _check_optimizer(self.optimizer)
        _check_schedule(self.schedule, self.steps)
        if self.evaluation.stop_after and not self.evaluation.every:
            raise TrainingError(
                f"evaluation.stop_after is {self.evaluation.stop_after} and evaluation.every 0, so there is nothing to "
                "stop by; set evaluation.every"
            )
        together = math.lcm(self.evaluation.every, self.checkpoints.every)
        if self.checkpoints.keep_best and not 0 < together < self.steps:
            raise TrainingError(
                f"checkpoints.keep_best is true, but no step before the last is both evaluated (evaluation.every "
                f"{self.evaluation.every}) and saved (checkpoints.every {self.checkpoints.every}); set both to the same"
            )
        if self.activation_checkpointing.budget > 1:
            raise TrainingError(
                f"activation_checkpointing.budget is {self.activation_checkpointing.budget}; it must be between 0 and 1"
            )
        if self.activation_checkpointing.mode == "budget" and not self.compile:
            raise TrainingError(
                "activation_checkpointing.mode is 'budget', which the compiler keeps to, and compile is false; "
                "set compile to true or take another mode"
            )
        if not self.seed < 2**63:
            raise TrainingError(f"seed is {self.seed}; it must be less than 2**63")
        if self.data.sequence_length > self.model.max_sequence_length:
            raise TrainingError(
                f"data.sequence_length is {self.data.sequence_length}, more than the {self.model.max_sequence_length} "
                "positions of model.max_sequence_length; lower the one or raise the other"
            )

    def tokens_per_step(self) -> int:
        """Tokens that a step consumes, over all processes."""
        return self.batch.sequences * self.data.sequence_length


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


def _check_optimizer(optimizer: Optimizer) -> None:
    for key in ("momentum", "ema_decay"):
        if not 0 <= (value := getattr(optimizer, key)) < 1:
            raise TrainingError(f"optimizer.{key} is {value}; it must be at least 0 and less than 1")
    if optimizer.kind == "sgd" and optimizer.implementation != "auto":
        raise TrainingError(
            f"optimizer.implementation is {optimizer.implementation!r}, which is of AdamW, and optimizer.kind 'sgd'; "
            "set optimizer.implementation to auto"
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


def _class_of_entries(kind: Any) -> type | None:
    """The dataclass of which a list holds several; None for every other type."""
    entries = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    return typing.cast(type, entries) if dataclasses.is_dataclass(entries) else None


def _check_keys(values: dict[str, Any], cls: type, source: str, extra: set[str], prefix: str = "") -> None:
    """Raise for the first key that no field answers to, with the nearest known one."""
    sections = _sections(cls)
    for key, value in values.items():
        path = f"{prefix}{key}"
        kind = sections.get(key)
        if kind is None and path not in extra:
            known = [*_known_keys(Recipe), *sorted(extra), *(f"{prefix}{name}" for name in sections)]
            # Among the keys of this section first, where the slip most likely is.
            here = [k for k in known if k.startswith(prefix) and "." not in k[len(prefix) :]]
            near = difflib.get_close_matches(path, here, 1) or difflib.get_close_matches(path, known, 1, 0.0)
            raise TrainingError(f"unknown recipe key {path!r} in {source}; the nearest known one is {near[0]!r}")
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise TrainingError(f"{path} in {source} is {value!r}; it must be a section of keys")
            _check_keys(value, typing.cast(type, kind), source, extra, f"{path}.")
        if (entries := _class_of_entries(kind)) and isinstance(value, list):
            for number, entry in enumerate(value):
                if not isinstance(entry, dict):
                    raise TrainingError(f"{path}[{number}] in {source} is {entry!r}; it must be a section of keys")
                _check_keys(entry, entries, source, extra, f"{path}[{number}].")


def _check_required(values: dict[str, Any], cls: type, source: str, prefix: str = "") -> None:
    sections = _sections(cls)
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in values and required:
            hint = f" or model.preset, one of {', '.join(PRESETS)}" if prefix == "model." else ""
            raise TrainingError(f"{source} has no {prefix}{f.name}; state it{hint}")
        if f.name in values and dataclasses.is_dataclass(sections[f.name]):
            _check_required(values[f.name], typing.cast(type, sections[f.name]), source, f"{prefix}{f.name}.")
        if (entries := _class_of_entries(sections[f.name])) and isinstance(values.get(f.name), list):
            for number, entry in enumerate(values[f.name]):
                _check_required(entry, entries, source, f"{prefix}{f.name}[{number}].")


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
