"""A forward of its own for one instance of a module, which its class and the other instances know nothing of."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def bind(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `forward` the forward of this one instance."""
    forward.__dict__["of_tilewright"] = True
    module.__dict__["forward"] = MethodType(forward, module)


def is_bound(module: nn.Module) -> bool:
    """Whether the instance's forward is one that `bind` gave it."""
    own = module.__dict__.get("forward")
    return isinstance(own, MethodType) and "of_tilewright" in own.__func__.__dict__


def is_wrapped(module: nn.Module) -> bool:
    """Whether the instance's forward is one that something else has put over it."""
    own = module.__dict__.get("forward")
    # Pickling keeps a bound method by its name, so that a loaded module has its class's forward for its own.
    of_class = getattr(own, "__func__", None) is type(module).forward
    return own is not None and not is_bound(module) and not of_class


def unbind(module: nn.Module) -> None:
    """Let the instance run its class's forward again."""
    module.__dict__.pop("forward", None)
