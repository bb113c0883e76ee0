"""Several objectives on the same documents."""

from __future__ import annotations

import dataclasses
from typing import Any

from agentx.data.objectives.base import (
    CHOOSE,
    Example,
    Objective,
    check_steady,
    draw,
    random_generator,
)
from agentx.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Draws one of several objectives for each document and epoch, with the given probabilities.

    Mixture((PlainText(), InfillCall(1.0)), (0.9, 0.1)) leaves nine documents in ten plain.
    """

    objectives: tuple[Objective, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        check_steady("Mixture.objectives", self.objectives)
        if len(self.objectives) != len(self.shares) or not self.shares:
            raise ValueError(
                f"a Mixture of {len(self.objectives)} objectives has {len(self.shares)} shares; "
                "give one for each"
            )
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shares must be 0 or more and not all 0, got {self.shares}")
        inner = any(map(_holds_mixture, self.objectives))
        if inner and sum(share > 0 for share in self.shares) > 1:  # with one there is no draw
            raise ValueError(
                "a Mixture within a Mixture would draw the same number twice: put all objectives "
                "into one, their shares multiplied"
            )

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        chosen = draw(random_generator(seed, epoch, index, CHOOSE), self.shares)
        return self.objectives[chosen](trajectory, seed, epoch, index)

    def room(self, trajectory: Trajectory) -> int:
        return max(objective.room(trajectory) for objective in self.objectives)


def _holds_mixture(objective: Any) -> bool:
    """Whether it is a Mixture, or stands around one."""
    while objective is not None and not isinstance(objective, Mixture):
        objective = getattr(objective, "base", None)
    return objective is not None
