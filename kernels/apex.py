"""NVIDIA apex's ``FusedAdam``: whether the real one is there and serves, and a step of AdamW through it.

The name belongs to another package on PyPI, a Pyramid toolkit of 2013, which is recognised and refused.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.adamw import Slot

_DEVICES = ("cuda",)


def fused_adam_class() -> Any:
    """NVIDIA's ``apex.optimizers.FusedAdam``.

    Raises:
        ValueError: apex is not there, is not NVIDIA's, or was built without its CUDA extensions.
    """
    cause = "AdamW: implementation is 'apex', but "
    mend = "build NVIDIA's with its CUDA extensions from https://github.com/NVIDIA/apex, or use implementation='auto'"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ValueError(f"{cause}apex is not installed: {mend}")
    if not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or []):
        # Not imported: what it would run is not what anybody wanted.
        raise ValueError(
            f"{cause}the apex installed here ({spec.origin}) is not NVIDIA's: it has no apex.optimizers; PyPI's "
            f"apex is an unrelated Pyramid toolkit: pip uninstall apex, then {mend}"
        )
    try:
        importlib.import_module("amp_C")  # the CUDA extension, without which FusedAdam is there but cannot run
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{cause}its FusedAdam cannot be used ({error}): {mend}") from None


def check_fused_adam_serves(parameter: torch.Tensor, options: Mapping[str, Any]) -> None:
    """Raise where FusedAdam would not do to `parameter` what a group's options ask for.

    Raises:
        ValueError: it would not; the message names the option or the parameter's device or dtype.
    """
    lacks = None
    if parameter.device.type not in _DEVICES:
        lacks = f"takes CUDA tensors, and a parameter is on {parameter.device}"
    elif parameter.dtype == torch.float64:
        lacks = "takes no float64 parameters"
    elif options["maximize"]:
        lacks = "does not maximize"
    elif options["state_dtype"] != torch.float32:
        lacks = f"keeps its state in float32, and state_dtype is {options['state_dtype']}"
    elif parameter.dtype == torch.bfloat16 and options["rounding"] != "nearest":
        lacks = f"rounds to nearest, and rounding is {options['rounding']!r}"
    if lacks:
        raise ValueError(f"AdamW: implementation is 'apex', whose FusedAdam {lacks}; use implementation='auto'")


class FusedAdamStep:
    """A step of the parameters in `slots`, in place, by a FusedAdam that shares their memory.

    Their `step` stands on the host, where FusedAdam wants it.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._parameters = [torch.nn.Parameter(slot.param, requires_grad=False) for slot in slots]
        self._optimizer = fused_adam_class()(self._parameters, adam_w_mode=True, bias_correction=True)
        for parameter, slot in zip(self._parameters, slots, strict=True):
            self._optimizer.state[parameter] = {"exp_avg": slot.exp_avg, "exp_avg_sq": slot.exp_avg_sq}

    def __call__(self, grads: Sequence[torch.Tensor], options: Mapping[str, Any]) -> None:
        """Make the step.

        Args:
            grads: one for each slot, of its shape and dtype.
            options: ``lr``, ``betas``, ``eps`` and ``weight_decay``.

        Raises:
            ValueError: a gradient has not the dtype of its parameter.
        """
        by_step: dict[int, list[torch.nn.Parameter]] = {}  # FusedAdam counts one step for a whole group
        for parameter, slot, grad in zip(self._parameters, self.slots, grads, strict=True):
            if grad.dtype != parameter.dtype:
                raise ValueError(
                    f"AdamW: implementation is 'apex', and a gradient has dtype {grad.dtype} and its parameter "
                    f"{parameter.dtype}; they must be one: use implementation='auto'"
                )
            parameter.grad = grad
            by_step.setdefault(int(slot.step), []).append(parameter)
        numbers = {name: options[name] for name in ("betas", "eps", "weight_decay")} | {"lr": float(options["lr"])}
        for step, parameters in by_step.items():
            self._optimizer.param_groups[0].update(params=parameters, step=step, **numbers)
            self._optimizer.step()
        for parameter, slot in zip(self._parameters, self.slots, strict=True):
            parameter.grad = None
            slot.step.add_(1)
