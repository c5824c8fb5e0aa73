"""Tables of cosines and sines for `rotary`, and the rules that stretch them to contexts longer than were trained on.

Pair i of rotary_dim/2 turns by θ_i = base^(−2i / rotary_dim) a token, so its wavelength is 2π / θ_i tokens. A rule
replaces θ_i by a smaller frequency, and one of them also scales cosines and sines by an amplitude. With s the factor by
which the context grows, L₀ the number of positions trained on and h = rotary_dim/2:

    linear      θ_i / s: positions are interpolated (Chen et al. 2023, arXiv:2306.15595)
    NTK         θ_i · s^(−i / (h − 1)): the fastest pair is left alone and the slowest divided by s, which equals a base
                of base · s^(h / (h − 1)) (u/bloc97 2023); dynamic: s grows with the sequence length beyond L₀
    YaRN        fast pairs are left alone, slow ones divided by s, those between blended (Peng et al. 2023,
                arXiv:2309.00071)
    Llama-3     the same idea with the blend linear in the number of turns (Grattafiori et al. 2024, arXiv:2407.21783)

Everything is computed in float64 and rounded once, to the tables' dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from tilewright.kernels.checks import FLOATS, is_number, is_whole


def rotary_tables(
    max_positions: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: RotaryScaling | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency for `rotary`, computed in float64 and rounded once.

    Args:
        max_positions: the number of positions, 0 … max_positions − 1.
        rotary_dim: how many elements of each head turn; even.
        base: the frequency of pair i is base^(−2i / rotary_dim) before scaling.
        scaling: the rule for a longer context; None leaves the frequencies alone.

    Returns:
        cos and sin, each (max_positions, rotary_dim/2); the rule's amplitude, where it has one, is a factor of both.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not (is_whole(max_positions) and max_positions >= 1):
        raise ValueError(f"rotary_tables: max_positions is {max_positions!r}; it must be at least 1, an integer")
    if not (is_whole(rotary_dim) and rotary_dim >= 2) or rotary_dim % 2:
        raise ValueError(f"rotary_tables: rotary_dim is {rotary_dim!r}; it must be even and at least 2")
    if not (is_number(base) and base > 0):
        raise ValueError(f"rotary_tables: base is {base!r}; it must be above 0 and finite, below 2⁶³")
    if scaling is not None and not isinstance(scaling, RotaryScaling):
        raise ValueError(f"rotary_tables: scaling is {scaling!r}; it must be a RotaryScaling, such as LinearScaling")
    if dtype not in FLOATS:
        raise ValueError(f"rotary_tables: dtype is {dtype}; it must be float32, float16, bfloat16 or float64")
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim
    frequencies = torch.pow(base, -exponents)
    amplitude = 1.0
    if scaling is not None:
        frequencies, amplitude = scaling.frequencies(frequencies, base), scaling.amplitude
    positions = torch.arange(max_positions, device=device, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    return (amplitude * angles.cos()).to(dtype), (amplitude * angles.sin()).to(dtype)


@dataclass(frozen=True, kw_only=True)
class RotaryScaling(ABC):
    """A rule for rotary positions beyond those a model was trained on, to be given to `rotary_tables`.

    Attributes:
        factor: by how much the context grows, at least 1.

    Raises:
        ValueError: on construction, where an attribute is out of its range.
    """

    factor: float

    def __post_init__(self) -> None:
        self._require("factor", is_number(self.factor) and self.factor >= 1, "at least 1 and finite, below 2⁶³")

    @abstractmethod
    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        """The scaled frequencies, from those of the pairs 0 … rotary_dim/2 − 1 (float64) and their base."""

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def _require_positions(self, name: str) -> None:
        value = getattr(self, name)
        self._require(name, is_whole(value) and value >= 1, "at least 1, an integer")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RotaryScaling):
    """Every frequency divided by `factor`, as if positions were interpolated (arXiv:2306.15595)."""

    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class NTKScaling(RotaryScaling):
    """The base raised so that the slowest pair's frequency is divided by `factor` and the fastest is left alone."""

    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        return _base_raised(frequencies, self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(RotaryScaling):
    """`NTKScaling` by a factor that follows the sequence length: 1 up to `original_max_positions`, then growing by
    `factor` for each further such length. The tables hold for that one sequence length.

    Attributes:
        original_max_positions: the positions trained on.
        sequence_length: of the sequence to be turned.
    """

    original_max_positions: int
    sequence_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positions("original_max_positions")
        self._require_positions("sequence_length")

    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        excess = max(self.sequence_length, self.original_max_positions) / self.original_max_positions - 1
        return _base_raised(frequencies, 1 + self.factor * excess)


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RotaryScaling):
    """YaRN (arXiv:2309.00071): pairs that turn more than `beta_fast` times over the positions trained on are left
    alone, those that turn less than `beta_slow` times are divided by `factor`, and between the two pairs the blend is
    linear in the pair's index, as in the authors' code and the models trained with it (the paper has it linear in the
    number of turns). Cosines and sines grow by an amplitude, and the attention scores by its square.

    Attributes:
        original_max_positions: the positions trained on.
        beta_fast, beta_slow: turns over the positions trained on.
        attention_factor: the amplitude; None computes m(1), where m(c) = 1 + 0.1 · c · ln(factor).
        mscale, mscale_all_dim: given together, as DeepSeek does, the amplitude is m(mscale) / m(mscale_all_dim).
        truncate: round the two pair indices outwards to whole ones.
    """

    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positions("original_max_positions")
        self._require("beta_slow", is_number(self.beta_slow) and self.beta_slow > 0, "above 0 and finite")
        fast = is_number(self.beta_fast) and self.beta_fast > self.beta_slow
        self._require("beta_fast", fast, f"above beta_slow ({self.beta_slow}) and finite")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            self._require(name, value is None or (is_number(value) and value > 0), "above 0 and finite, or None")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"YarnScaling: mscale is {self.mscale} and mscale_all_dim {self.mscale_all_dim}; give both or neither"
            )
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError(
                f"YarnScaling: attention_factor is {self.attention_factor} and mscale {self.mscale}; give one of them"
            )

    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        if base <= 1:
            raise ValueError(f"YarnScaling: base is {base}; it must be above 1, so that later pairs turn slower")
        half = frequencies.numel()
        first, last = (
            self._pair_that_turns(self.beta_fast, half, base),
            self._pair_that_turns(self.beta_slow, half, base),
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The bounds are those of the authors' code, the elements' index rather than the pairs' among them.
        first, last = max(first, 0), min(last, 2 * half - 1)
        span = last - first if last != first else 0.001
        pairs = torch.arange(half, device=frequencies.device, dtype=frequencies.dtype)
        slow = ((pairs - first) / span).clamp(0, 1)  # 0 left alone … 1 divided by the factor
        return torch.lerp(frequencies, frequencies / self.factor, slow)

    def _pair_that_turns(self, turns: float, half: int, base: float) -> float:
        """The index, not whole, of the pair that turns so many times over the positions trained on."""
        return half * math.log(self.original_max_positions / (2 * math.pi * turns)) / math.log(base)

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._amplitude(self.mscale) / self._amplitude(self.mscale_all_dim)
        return self._amplitude(1.0)

    def _amplitude(self, scale: float) -> float:
        return 1 + 0.1 * scale * math.log(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's rule: pairs that turn at least `high_freq_factor` times over the positions trained on are left alone,
    those that turn at most `low_freq_factor` times are divided by `factor`, and between the two the blend is linear in
    the number of turns (arXiv:2407.21783 and the code released with the models).

    Attributes:
        original_max_positions: the positions trained on.
        low_freq_factor, high_freq_factor: turns over the positions trained on.
    """

    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positions("original_max_positions")
        low, high = self.low_freq_factor, self.high_freq_factor
        self._require("low_freq_factor", is_number(low) and low > 0, "above 0 and finite")
        self._require("high_freq_factor", is_number(high) and high > low, f"above low_freq_factor ({low}) and finite")

    def frequencies(self, frequencies: torch.Tensor, base: float) -> torch.Tensor:
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)


def _base_raised(frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """`frequencies` of a base raised so that the last is divided by `factor`."""
    half = frequencies.numel()
    if half < 2:
        raise ValueError(
            f"rotary_tables: rotary_dim is {2 * half}; NTK scaling spreads over pairs and needs at least 4"
        )
    pairs = torch.arange(half, device=frequencies.device, dtype=frequencies.dtype)
    return frequencies * torch.pow(factor, -pairs / (half - 1))
