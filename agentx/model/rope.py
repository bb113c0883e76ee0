"""How RoPE turns in rows that are longer than those a model was first trained on.

Each kind of scaling is the paper's, in the form in which checkpoints give it and transformers
computes it. `frequencies(theta, head_dim, max_length)` gives the angle in radians a position by
which each pair of a head turns, and a factor of the cosines and sines.

All depend on numbers of the config alone. Where transformers looks at the longest row of a call
(dynamic, long-context factors), here it is the longest that the model is configured for: so what
lies in a cache stays right as a row grows, and a row does not depend on its neighbours. Up to the
original length of a model that is configured for no more, the two are the same.

Legend: H head size.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

Frequencies = tuple[np.ndarray, float]


def unscaled(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i / H) for every pair i: f64[H / 2] (Su et al., 2021)."""
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Every frequency divided by `factor` (Chen et al., 2023)."""

    factor: float

    def __post_init__(self) -> None:
        _check(self)

    def frequencies(self, theta: float, head_dim: int, max_length: int) -> Frequencies:
        return unscaled(theta, head_dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """A larger theta, the further `max_length` is beyond `original_length` (bloc97, 2023)."""

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check(self)

    def frequencies(self, theta: float, head_dim: int, max_length: int) -> Frequencies:
        beyond = max(max_length / self.original_length, 1.0)
        stretch = self.factor * beyond - (self.factor - 1)
        return unscaled(theta * stretch ** (head_dim / (head_dim - 2)), head_dim), 1.0


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """Slow pairs divided by `factor`, fast ones as they are, a ramp between (Peng et al., 2023).

    original_length: the length of rows before. beta_fast, beta_slow: the turns that a pair makes in
    it at both ends of the ramp. attention_factor: of cosines and sines; if None, from `factor`, and
    from `mscale` and `mscale_all_dim` where both are given and not 0 (as DeepSeek-V3 has them).
    truncate: whether the ramp begins and ends at whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"YarnRope: beta_slow must be above 0 and below beta_fast, not {self.beta_slow} "
                f"and {self.beta_fast}"
            )

    def frequencies(self, theta: float, head_dim: int, max_length: int) -> Frequencies:
        def pair(turns: float) -> float:
            """The pair, as a fraction, that makes so many turns in the original length."""
            wavelength = self.original_length / turns
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        # 0.001 where the ramp is a step, as in the original.
        ramp = (np.arange(head_dim // 2) - first) / ((last - first) or 0.001)
        divided = np.clip(ramp, 0, 1)
        plain = unscaled(theta, head_dim)
        return plain * (1 - divided) + plain / self.factor * divided, self._attention_factor()

    def _attention_factor(self) -> float:
        def scale(multiplier: float) -> float:
            return 0.1 * multiplier * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Pairs of a long wavelength divided by `factor`, of a short one not (Llama 3.1).

    Long is more than original_length / low_freq_factor, short less than original_length /
    high_freq_factor; between the two it goes over smoothly.
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"Llama3Rope: low_freq_factor must be above 0 and below high_freq_factor, not "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    def frequencies(self, theta: float, head_dim: int, max_length: int) -> Frequencies:
        plain = unscaled(theta, head_dim)
        turns = self.original_length * plain / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(share, 0, 1)
        return plain * kept + plain / self.factor * (1 - kept), 1.0


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Every pair divided by a number of its own (LongRoPE, Ding et al., 2024).

    short_factor, long_factor: H / 2 numbers each, for models of at most `original_length` tokens
    and of more. factor: how much longer rows become, max_length / original_length if None.
    attention_factor: of cosines and sines; from `factor` if None.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        if not min(*self.short_factor, *self.long_factor) > 0:
            raise ValueError("LongRope: short_factor and long_factor must be above 0")

    def frequencies(self, theta: float, head_dim: int, max_length: int) -> Frequencies:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != head_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(getattr(self, name))} numbers; a head of "
                    f"{head_dim} has {head_dim // 2} pairs"
                )
        is_long = max_length > self.original_length
        divisors = np.array(self.long_factor if is_long else self.short_factor)
        factor = self.factor or max_length / self.original_length
        attention = self.attention_factor
        if attention is None:
            excess = math.log(max(factor, 1.0)) / math.log(self.original_length)
            attention = math.sqrt(1 + excess)
        return unscaled(theta, head_dim) / divisors, attention


RopeScaling = LinearRope | DynamicRope | YarnRope | Llama3Rope | LongRope


def _check(scaling: RopeScaling) -> None:
    """What all kinds ask of the numbers that most of them have."""
    name, factor = type(scaling).__name__, scaling.factor
    if factor is not None and not 1 <= factor < math.inf:
        raise ValueError(f"{name}: factor is {factor}; it must be 1 or more")
    original_length = getattr(scaling, "original_length", None)
    if original_length is not None and original_length < 2:
        raise ValueError(f"{name}: original_length is {original_length}; it must be over 1")
