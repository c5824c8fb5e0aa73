"""Recipes: presets, overrides, types, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tilewright.model import PRESETS
from tilewright.trainer import TrainingError
from tilewright.trainer.recipe.file import load_recipe, recipe_text, shipped_recipes

Write = Callable[..., Path]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_its_resolved_text_gives_it_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe_text(recipe))
    assert load_recipe(str(saved)) == recipe


def test_a_preset_fills_in_what_the_section_does_not_state(tiny_recipe: Write) -> None:
    model = load_recipe(str(tiny_recipe(model__preset="gpt2"))).model
    assert (model.norm, model.bias) == (PRESETS["gpt2"].norm, PRESETS["gpt2"].bias) == ("layer_norm", True)
    assert model.hidden_size == 32


def test_overrides_in_both_spellings_change_any_key(tiny_recipe: Write) -> None:
    overrides = ["--steps", "9", "--optimizer.learning_rate=3e-4", "--optimizer.betas", "[0.8, 0.9]"]
    recipe = load_recipe(str(tiny_recipe()), overrides)
    assert (recipe.steps, recipe.optimizer.learning_rate, recipe.optimizer.betas) == (9, 3e-4, (0.8, 0.9))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--optimizer.learning_rat", "1"],
            "unknown recipe key 'optimizer.learning_rat' .* is 'optimizer.learning_rate'",
        ),
        (["--stepps", "1"], "unknown recipe key 'stepps' .* nearest known one is 'steps'"),
        (["--model.hidden", "1"], "unknown recipe key 'model.hidden' .* is 'model.hidden_size'"),
        (["--learning_rate", "1"], "unknown recipe key 'learning_rate' .* is 'optimizer.learning_rate'"),
        (["--steps"], "--steps has no value"),
        (["steps", "3"], "'steps' is not an override"),
        (["--steps.more", "3"], "--steps.more does not fit: steps is a single value"),
        (["--batch", "3"], "batch in .* is 3; it must be a section"),
        (["--steps", "many"], "steps.*Expected a <class 'int'>. Got value: many"),
        (["--steps", "0"], "steps is 0; it must be 1 or more"),
        (["--schedule.kind", "square"], "schedule.kind"),
        (["--model.heads", "3", "--model.kv_heads", "2"], r"model.heads is 3, which model.kv_heads \(2\)"),
        (["--model.preset", "lama"], "model.preset is 'lama'; there are"),
        (["--data.sequence_length", "64"], "data.sequence_length is 64, more than the 32 positions"),
        (["--schedule.warmup_steps", "7"], r"schedule.warmup_steps \(7\) .* are more than steps \(6\)"),
        (["--name", "a/b"], "name is 'a/b'; it names the run directory"),
        (["--optimizer.learning_rate", ".nan"], "optimizer.learning_rate is nan; it must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key_named(
    tiny_recipe: Write, overrides: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_recipe(str(tiny_recipe()), overrides)


def test_a_missing_file_is_refused_with_the_recipes_that_ship() -> None:
    with pytest.raises(TrainingError, match=r"there is no recipe file nowhere.yaml; .* quickstart"):
        load_recipe("nowhere.yaml")


def test_a_file_that_is_not_yaml_is_refused_with_the_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\nmodel: [1, 2\nsteps: 3\n")
    with pytest.raises(TrainingError, match=r"bad.yaml is not YAML at line 3"):
        load_recipe(str(bad))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\nmodel: {preset: gpt2}\ndata: {corpus: x}\nbatch: {sequences: 1, micro_batch: 1}\n")
    with pytest.raises(TrainingError, match=r"bad.yaml has no data.sequence_length; state it"):
        load_recipe(str(bad))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--steps", "[a"], r"--steps \[a is not a value"),
        (["--model.preset", "[a]"], r"model.preset is \['a'\]; it must be one of"),
        (
            ["--optimizer.betas", "[2.0, 0.9]"],
            r"optimizer.betas is \(2.0, 0.9\); each must be at least 0",
        ),
        (["--model.rotary_base", "0"], r"model.rotary_base is 0.0; it must be more than 0"),
        (["--model.norm_eps", "1.0e300"], r"norm_eps is 1e\+300; it must be more than 0 and below 2\*\*63"),
        (["--data.prefetch", "1000000"], "data.prefetch is 1000000 steps, .* set it to 1024 at most"),
        (["--health.spike_window", "0"], "health.spike_window is 0; it must be 4 or more"),
        (["--health.spike_score", ".nan"], "health.spike_score is nan; it must be 0 or more"),
        (["--health.bad_steps", "0"], "health.bad_steps is 0; it must be 1 or more"),
        (["--sample.prompt", "\udcff"], "sample.prompt is .* which is not text"),
        (["--checkpoints.folder", "s3:/bucket"], "which is no URL, .*; write s3://bucket, or ./ before it"),
        (["--checkpoints.folder", "memory://runs"], "memory://runs, which ends with the process"),
        (["--runs", "~/runs"], "runs is ~/runs, whose ~ nothing here stands for"),
        (["--sample.temperature", ".inf"], r"sample.temperature is inf; it must be 0 or more"),
        (["--optimizer.weight_decay", "-1"], r"optimizer.weight_decay is -1.0; it must be 0 or more"),
        (["--seed", "99999999999999999999"], r"seed is 99999999999999999999; it must be less than 2\*\*63"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(
    tiny_recipe: Write, overrides: list[str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_recipe(str(tiny_recipe()), overrides)


def test_text_that_looks_like_yaml_is_still_text(tiny_recipe: Write) -> None:
    recipe = load_recipe(str(tiny_recipe()), ["--sample.prompt", "def main():", "--name", "123"])
    assert (recipe.sample.prompt, recipe.name) == ("def main():", "123")


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(TrainingError, match=r"bad.yaml is not a text file in UTF-8"):
        load_recipe(str(bad))
