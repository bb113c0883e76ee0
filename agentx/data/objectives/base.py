"""What every objective takes and gives, and the random numbers that it may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from agentx.trajectory import Trajectory

# Streams of random numbers for one document that must not touch each other.
CHOOSE, CUT = 0, 1


@dataclasses.dataclass(frozen=True)
class Example:
    """One document as an objective wants it seen.

    ids: i32[n]. weights: f32[n], the loss weight of predicting `ids[i]` from those before it;
    `weights[0]` is 0. roles, origins, outcomes: u8[n], of the span that each token came from.
    """

    ids: np.ndarray
    weights: np.ndarray
    roles: np.ndarray
    origins: np.ndarray
    outcomes: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class Objective(Protocol):
    """What every objective can do."""

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        """The example, the same for the same arguments. `index` numbers the document."""
        ...

    def room(self, trajectory: Trajectory) -> int:
        """The most tokens by which the objective may lengthen it, for the planner to reserve."""
        ...


def random_generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one document in one epoch: seed and epoch in [0, 2**32)."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{name} is {value}; it must be in [0, 2**32)")
    assert 0 <= index < 1 << 64, index
    return np.random.Generator(
        np.random.Philox(key=(seed << 96) | (epoch << 64) | index, counter=stream << 192)
    )


def check_rates(name: str, rate: float, shares: dict[str, float]) -> None:
    """Raises ValueError for a rate outside [0, 1] and for shares that are no shares."""
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}.rate is {rate}; it must be in [0, 1]")
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        *most, last = shares
        *values, value = shares.values()
        raise ValueError(
            f"{name}.{', '.join(most)} and {last} must be 0 or more and not all 0, got "
            f"{', '.join(map(str, values))} and {value}"
        )


def draw(rng: np.random.Generator, shares: Sequence[float]) -> int:
    """An index, each as often as its share says."""
    sums = np.cumsum(shares)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
