"""A trained model, back from its run directory into one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.corpus import Corpus
from tilewright.kernels import choose
from tilewright.model import Transformer, generate
from tilewright.trainer.checkpoints.checkpoint import committed, load, seen_by_the_first, training_state
from tilewright.trainer.data import TrainingData, check_same_data, open_data
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.evaluate import evaluate
from tilewright.trainer.optimization.averaging import AVERAGE, averaged_state
from tilewright.trainer.parallel.sharding import world
from tilewright.trainer.recipe import Recipe
from tilewright.trainer.recipe.file import recipe_from_run
from tilewright.trainer.run_directory import RECIPE


@dataclass(frozen=True)
class Trained:
    """The newest committed model of a run, with what it was trained by and on."""

    model: Transformer
    recipe: Recipe
    data: TrainingData
    step: int


def load_trained(run: Path, device: torch.device, *, averaged: bool = False) -> Trained:
    """Read a run directory; `averaged`: the model has the average of its weights, `optimizer.ema_decay`'s.

    Raises:
        TrainingError: it is no run directory, or it holds no committed checkpoint, or that is damaged, or no average.
    """
    recipe = recipe_from_run(run / RECIPE)
    if averaged and not recipe.optimizer.ema_decay:
        raise TrainingError(f"{run} keeps no average of its weights: its recipe has optimizer.ema_decay 0")
    check_kernels(device, getattr(torch, recipe.compute_dtype))
    checkpoints = seen_by_the_first(lambda: committed(run, recipe.checkpoints.folder), None)
    if not checkpoints:
        raise TrainingError(f"{run} holds no committed checkpoint yet; let the run come to one, or stop it with Ctrl-C")
    data = open_data(recipe.data)
    check_vocabulary(recipe, data)
    check_same_data(run, data)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    model.to_empty(device="cpu")
    wanted = averaged_state(dict(model.named_parameters())) if averaged else training_state(model)
    if load(checkpoints[-1], wanted, optional=(AVERAGE,)):
        raise TrainingError(
            f"{checkpoints[-1].path} is of a step before optimizer.ema_decay was set, and holds no average of the "
            "weights; let the run come to its next checkpoint"
        )
    for parameter in model.parameters():
        # The parameters alone: the rotary tables stay float32.
        parameter.data = parameter.data.to(device, getattr(torch, recipe.compute_dtype))
    model.to(device)
    model.fill_rotary_tables()
    return Trained(model.eval(), recipe, data, checkpoints[-1].step)


def evaluate_run(run: Path, *, averaged: bool = False) -> tuple[int, dict[str, dict[str, float]]]:
    """The step of a run's newest checkpoint and its scores on all held-out text; see `evaluate` and `load_trained`.

    Raises:
        TrainingError, CorpusError: the run, its checkpoint or its corpus is missing or damaged.
    """
    with world() as processes:
        trained = load_trained(run, processes.device, averaged=averaged)
        result = evaluate(
            trained.model,
            trained.data.heldout_streams(sequence_length=trained.recipe.data.sequence_length),
            processes,
            windows=0,
            micro_batch=trained.recipe.batch.micro_batch,
            byte_lengths=trained.data.tokenizer.byte_lengths,
            across_documents=trained.recipe.data.across_documents,
        )
    return trained.step, result


def continue_prompt(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    averaged: bool = False,
) -> str:
    """What a run's newest checkpoint makes of a prompt; the arguments are those of `generate` and `load_trained`.

    Raises:
        TrainingError, CorpusError: an argument does not fit, or the run is missing or damaged.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TrainingError("the prompt is not text: it holds bytes that are no UTF-8; give it in UTF-8") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(run, device, averaged=averaged)
    tokenizer = trained.data.tokenizer
    try:
        tokens = generate(
            trained.model,
            tokenizer.encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            stop=tokenizer.end_of_text,
            seed=seed,
        )
    except ValueError as error:
        raise TrainingError(str(error)) from None
    return tokenizer.decode(tokens)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raise before anything is built if the kernels that are demanded cannot run here.

    Raises:
        TrainingError: see `tilewright.kernels.choose`.
    """
    try:
        choose(device, dtype)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def check_vocabulary(recipe: Recipe, data: TrainingData | Corpus) -> None:
    """Raise unless the model has a row for every token of the data.

    Raises:
        TrainingError: its vocabulary is too small.
    """
    needed = data.tokenizer.vocab_size
    corpus = recipe.data.corpus or ", ".join(source.corpus for source in recipe.data.sources)
    if recipe.model.vocab_size < needed:
        raise TrainingError(
            f"model.vocab_size is {recipe.model.vocab_size}, but the tokenizer of {corpus} has {needed} "
            f"tokens; set --model.vocab_size {needed}, or build a corpus with --vocab-size {recipe.model.vocab_size}"
        )
