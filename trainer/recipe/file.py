"""Reading a recipe from YAML, with dotted overrides.

    recipe = load_recipe("recipes/quickstart.yaml", ["--seed", "1", "--optimizer.learning_rate", "2e-3"])

Keys that no field answers to are refused with the nearest known one. What is saved beside every checkpoint is the
resolved recipe: each value stated, presets filled in.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tilewright.model import PRESETS, ModelConfigError, from_preset
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.recipe import Recipe

if TYPE_CHECKING:
    from tilewright.trainer.checkpoints.storage import Location


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


def recipe_from_run(path: Location) -> Recipe:
    """The resolved recipe saved in a run directory, or beside the checkpoints of a run.

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


def _read(path: Location) -> str:
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
