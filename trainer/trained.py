"""A trained model, back from its run directory into one process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.corpus import Corpus, HeldOutStream, open_corpus
from tilewright.kernels import choose
from tilewright.model import Transformer, generate
from tilewright.trainer.checkpoint import committed, load, training_state
from tilewright.trainer.errors import TrainingError
from tilewright.trainer.evaluate import evaluate
from tilewright.trainer.parallel import world
from tilewright.trainer.recipe import Recipe, recipe_from_run
from tilewright.trainer.run_directory import RECIPE

CORPUS = "corpus.json"


@dataclass(frozen=True)
class Trained:
    """The newest committed model of a run, with what it was trained by and on."""

    model: Transformer
    recipe: Recipe
    corpus: Corpus
    step: int


def load_trained(run: Path, device: torch.device) -> Trained:
    """Read a run directory.

    Raises:
        TrainingError: it is no run directory, or it holds no committed checkpoint, or that is damaged.
    """
    recipe = recipe_from_run(run / RECIPE)
    check_kernels(device, getattr(torch, recipe.compute_dtype))
    checkpoints = committed(run)
    if not checkpoints:
        raise TrainingError(f"{run} holds no committed checkpoint yet; let the run come to one, or stop it with Ctrl-C")
    corpus = open_corpus(recipe.data.corpus)
    check_vocabulary(recipe, corpus)
    check_same_corpus(run, corpus)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    model.to_empty(device="cpu")
    load(checkpoints[-1], training_state(model))
    for parameter in model.parameters():
        # The parameters alone: the rotary tables stay float32.
        parameter.data = parameter.data.to(device, getattr(torch, recipe.compute_dtype))
    model.to(device)
    model.fill_rotary_tables()
    return Trained(model.eval(), recipe, corpus, checkpoints[-1].step)


def evaluate_run(run: Path) -> tuple[int, dict[str, float]]:
    """The step of a run's newest checkpoint and its score on all held-out text; see `evaluate`.

    Raises:
        TrainingError, CorpusError: the run, its checkpoint or its corpus is missing or damaged.
    """
    with world() as processes:
        trained = load_trained(run, processes.device)
        result = evaluate(
            trained.model,
            HeldOutStream(trained.corpus.heldout, sequence_length=trained.recipe.data.sequence_length),
            processes,
            windows=0,
            micro_batch=trained.recipe.batch.micro_batch,
            byte_lengths=trained.corpus.tokenizer.byte_lengths,
            across_documents=trained.recipe.data.across_documents,
        )
    return trained.step, result


def continue_prompt(run: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """What a run's newest checkpoint makes of a prompt; the arguments are those of `generate`.

    Raises:
        TrainingError, CorpusError: an argument does not fit, or the run is missing or damaged.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TrainingError("the prompt is not text: it holds bytes that are no UTF-8; give it in UTF-8") from None
    trained = load_trained(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = trained.corpus.tokenizer
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


def corpus_identity(corpus: Corpus) -> dict[str, object]:
    """What tells one corpus from another: its tokenizer, and how much text and how many tokens each split holds."""
    return {
        "tokenizer": corpus.tokenizer.fingerprint,
        **{
            split.folder.name: hashlib.sha256((split.folder / "manifest.json").read_bytes()).hexdigest()
            for split in (corpus.train, corpus.heldout)
        },
    }


def is_same_corpus(run: Path, corpus: Corpus) -> bool:
    """Whether a run was trained on `corpus`, as far as it recorded that."""
    try:
        return bool(json.loads((run / CORPUS).read_text(encoding="utf-8")) == corpus_identity(corpus))
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def check_same_corpus(run: Path, corpus: Corpus) -> None:
    """Raise if a run was trained on another corpus than `corpus`.

    Raises:
        TrainingError: it was; the corpus folder has been built anew from other text or with other settings.
    """
    if not is_same_corpus(run, corpus):
        raise TrainingError(
            f"{run} was trained on another corpus than the one that is now in {corpus.train.folder.parent.parent}; "
            "bring that one back, or start a new run in another run directory"
        )


def check_vocabulary(recipe: Recipe, corpus: Corpus) -> None:
    """Raise unless the model has a row for every token of the corpus.

    Raises:
        TrainingError: its vocabulary is too small.
    """
    needed = corpus.tokenizer.vocab_size
    if recipe.model.vocab_size < needed:
        raise TrainingError(
            f"model.vocab_size is {recipe.model.vocab_size}, but the tokenizer of {recipe.data.corpus} has {needed} "
            f"tokens; set --model.vocab_size {needed}, or build a corpus with --vocab-size {recipe.model.vocab_size}"
        )
