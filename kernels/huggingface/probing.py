"""Trying a module on a small input: what the recognisers need to compare what it computes with what a kernel would."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Unsuited(Exception):
    """Why a module is left alone, in words for the report."""


def one_argument(module: nn.Module) -> None:
    if len(inspect.signature(type(module).forward).parameters) != 2:
        raise Unsuited("has a forward of more than one argument")


def result_of(call: Callable[[], Any]) -> Any:
    """What the probe gives. Whatever it raises means only that the module is of another kind."""
    try:
        with torch.no_grad():
            return call()
    except Exception as error:
        raise Unsuited(f"cannot be tried on a small input: {type(error).__name__}: {error}") from error


def equal(theirs: Any, ours: Any) -> bool:
    return isinstance(theirs, torch.Tensor) and theirs.shape == ours.shape and torch.allclose(theirs, ours, 1e-4, 1e-5)


@contextmanager
def standing_in(module: nn.Module, functions: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Give children of `module` other forwards for a while."""
    children = [module.get_submodule(name) for name in functions]
    before = [child.__dict__.get("forward") for child in children]
    for child, function in zip(children, functions.values(), strict=True):
        child.__dict__["forward"] = function
    try:
        yield
    finally:
        for child, forward in zip(children, before, strict=True):
            if forward is None:
                del child.__dict__["forward"]
            else:
                child.__dict__["forward"] = forward


def both_modes(module: nn.Module) -> Iterator[bool]:
    """Once in training and once in evaluation mode; dropout on the way shows in one of them."""
    before = module.training
    try:
        for mode in (True, False):
            module.training = mode
            yield mode
    finally:
        module.training = before
