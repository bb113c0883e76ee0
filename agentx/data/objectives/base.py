"""What every objective takes and gives, and the random numbers that it may use.

Markers have the ids that the trajectory says. An objective that looks for calls, thoughts or a list
of tools goes by the markers of the tool format: a document of another chat format, whose spans do
not begin with them, is left as it is, with the weights of its roles.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from agentx.trajectory import Trajectory

# Streams of random numbers for one document that must not touch each other. 2 is the pipeline's.
CHOOSE, CUT, RENAME, OFFER, TRACE = 0, 1, 3, 4, 5


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
    """What every objective can do. A `Schedule` has `at` too, which whoever reads rows asks."""

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
    key = np.array([index, seed << 32 | epoch], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    # numpy takes any ISeedSequence; its stubs know only one.
    philox = np.random.Philox(_Key(key), counter=counter)  # type: ignore[arg-type]
    return np.random.Generator(philox)


class _Key(ISeedSequence):
    """A Philox key as it is: given as `key`, Philox would first gather entropy that it drops."""

    def __init__(self, words: np.ndarray):
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        assert n_words == len(self._words), n_words
        return self._words


def check_steady(place: str, objectives: Sequence[Objective]) -> None:
    """Raises ValueError for an objective within another that is a `Schedule`."""
    if any(hasattr(objective, "at") for objective in objectives):
        raise ValueError(
            f"{place} holds a Schedule, which can only stand outermost: let its parts hold what is "
            "around it"
        )


def check_share(name: str, value: float) -> None:
    """Raises ValueError for a rate or a share outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def check_rates(name: str, rate: float, shares: dict[str, float]) -> None:
    """Raises ValueError for a rate outside [0, 1] and for shares that are no shares."""
    check_share(f"{name}.rate", rate)
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        *most, last = shares
        *values, value = shares.values()
        raise ValueError(
            f"{name}.{', '.join(most)} and {last} must be 0 or more and not all 0, got "
            f"{', '.join(map(str, values))} and {value}"
        )


def draw(rng: np.random.Generator, shares: Sequence[float]) -> int:
    """An index, each as often as its share says."""
    sums = list(itertools.accumulate(shares))
    return bisect.bisect_right(sums, rng.random() * sums[-1])
