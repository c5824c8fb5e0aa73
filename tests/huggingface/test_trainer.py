"""The Trainer of transformers on a patched model, end to end."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tilewright.kernels import patch

from .conftest import VOCABULARY, build


def losses(model: PreTrainedModel, directory: Path) -> list[float]:
    """The loss of each of eight steps, of two micro-batches with unequal numbers of targets; and of an evaluation."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for number in range(32):
        start = torch.randint(3, VOCABULARY - 16, (1,), generator=generator)
        ids = start + torch.arange(16)
        examples.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < number % 5, -100)})
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=8,
        save_steps=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:4])
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(steps) == 8
    return steps + evaluated


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_trainer_gives_the_loss_curve_of_the_unpatched_model(family, tmp_path, capsys):
    theirs = losses(build(family), tmp_path / "theirs")
    model = build(family)
    patch(model)
    ours = losses(model, tmp_path / "ours")
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[7] < ours[0] - 0.5  # it learned
    saved = type(model).from_pretrained(tmp_path / "ours" / "checkpoint-8")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), model.parameters(), strict=True))
