"""The trainer: recipe in, trained model and its record out; one path for one process and for many."""

from tilewright.trainer.errors import TrainingError

__all__ = ["TrainingError"]
