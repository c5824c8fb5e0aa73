"""Why a provider is left out."""

from __future__ import annotations

import importlib.util

import torch


class NotServed(Exception):
    """The provider is not here, or does not compute what is asked for; the message says which, in a few words."""


def installed(module: str, distribution: str) -> None:
    """Raise `NotServed` unless `module` can be found."""
    if importlib.util.find_spec(module) is None:
        raise NotServed(f"{distribution} is not installed")


def on_cuda(name: str, device: torch.device) -> None:
    """Raise `NotServed` unless the device is a CUDA device."""
    if device.type != "cuda":
        raise NotServed(f"{name} runs on CUDA devices only")


def without(name: str, **options: object) -> None:
    """Raise `NotServed` for the first option that is asked for."""
    for option, value in options.items():
        if value is not None and value is not False and value != 0:
            raise NotServed(f"{name} has no {option}")
