"""The lean Transformer, its configuration and presets, its initial values, and sampling from it."""

from tilewright.model.config import PRESETS, ModelConfig, ModelConfigError, from_preset
from tilewright.model.generate import generate
from tilewright.model.initial_values import initialise
from tilewright.model.transformer import Transformer

__all__ = [
    "PRESETS",
    "ModelConfig",
    "ModelConfigError",
    "Transformer",
    "from_preset",
    "generate",
    "initialise",
]
