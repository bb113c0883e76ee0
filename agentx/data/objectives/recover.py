"""Recovery: a wrong call, taken back before it is made, and the right one."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from agentx.data.objectives.base import CUT, Example, check_rates, draw, random_generator
from agentx.data.objectives.calls import BACK, Call, whole_calls
from agentx.data.objectives.weights import NextToken
from agentx.data.store import TokenStore
from agentx.trajectory import Outcome, Role, Trajectory

_NEXT_TOKEN = NextToken()
# How many documents of a pool are asked for a wrong call before the document is left as it is.
_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Recover:
    """Puts a wrong call before a right one, without its <|end|>, and <|back|> between the two.

    A call is made when <|end|> closes it; up to there the model may see its error and take it back
    (arXiv:2408.16293 trains mathematics so). A renderer reads what follows the last <|back|>. Of
    this document, whose first call failed:

        <|bos|> <|user|> go <|call|> ls <|arguments|> x <|end|>
        <|observation|> no <|end|> <|call|> ls <|arguments|> . <|end|> <|answer|> 2 <|end|>

    The failure itself, without what came of it:

        token    <|bos|> <|user|> go
        weight         0        0  0
        token    <|call|> ls <|arguments|> x <|back|>
        weight          0  0             0 0        1
        token    <|call|> ls <|arguments|> . <|end|> <|answer|> 2 <|end|>
        weight          1  1             1 1       1          1 1       1

    Or a call from elsewhere, before a call that did not fail:

        token    <|bos|> <|user|> go
        weight         0        0  0
        token    <|call|> os <|arguments|> 2 <|back|>
        weight          0  0             0 0        1
        token    <|call|> ls <|arguments|> . <|end|> <|answer|> 2 <|end|>
        weight          1  1             1 1       1          1 1       1

    rate: the probability that a document gets a wrong call; the others are left to `base`, which
      also sets the weights of all that was there before.
    real, inserted: how often it is a failure of the document's own, or a call from elsewhere,
      relative to the other.
    pool: the token store whose calls are put in; "" for the document's own other calls.
    wrong, back: the weights of the wrong call and of <|back|>.
    longest: no call of more tokens is put in.
    """

    rate: float = 0.5
    base: NextToken = _NEXT_TOKEN
    real: float = 1.0
    inserted: float = 1.0
    pool: str = ""
    wrong: float = 0.0
    back: float = 1.0
    longest: int = 64

    def __post_init__(self) -> None:
        check_rates("Recover", self.rate, {"real": self.real, "inserted": self.inserted})
        if min(self.wrong, self.back) < 0:
            raise ValueError(
                f"Recover.wrong and back must be 0 or more, got {self.wrong} and {self.back}"
            )
        if self.longest < 3:
            raise ValueError(f"Recover.longest is {self.longest}; a call has 3 tokens or more")

    def room(self, trajectory: Trajectory) -> int:
        """A call without its <|end|>, and <|back|>, where there is a call to put it before."""
        return self.longest if self.rate > 0 and self._places(trajectory) else 0

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        example = self.base(trajectory, seed, epoch, index)
        rng = random_generator(seed, epoch, index, CUT)
        if rng.random() >= self.rate:
            return example
        places = self._places(trajectory)
        failures = self._failures(trajectory)
        shares = (self.real * bool(failures), self.inserted * bool(places))
        if not any(shares):
            return example
        if draw(rng, shares) == 0:
            failed, right = failures[int(rng.integers(len(failures)))]
            wrong = example.ids[failed.start : failed.stop - 1]
            return self._with(example, failed.start, right.step, wrong)
        right = places[int(rng.integers(len(places)))]
        found = self._elsewhere(trajectory, right, rng)
        return example if found is None else self._with(example, right.start, right.start, found)

    def _places(self, trajectory: Trajectory) -> list[Call]:
        """The calls that a wrong one may be put before: those that are trained."""
        table = self.base.table
        return [c for c in whole_calls(trajectory) if table[Role.CALL, c.outcome] > 0]

    def _failures(self, trajectory: Trajectory) -> list[tuple[Call, Call]]:
        """Each failed call with the call after it, where that recovered."""
        return [
            (failed, right)
            for failed, right in itertools.pairwise(whole_calls(trajectory))
            if failed.outcome is Outcome.FAILED and right.outcome is Outcome.RECOVERED
        ]

    def _elsewhere(
        self, trajectory: Trajectory, right: Call, rng: np.random.Generator
    ) -> np.ndarray | None:
        """The ids of another call than the right one, without its <|end|>."""
        right_ids = trajectory.ids[right.start : right.stop]
        pool = _open(self.pool) if self.pool else None
        for _ in range(_TRIES):
            other = trajectory if pool is None else pool[int(rng.integers(len(pool)))]
            ids = other.ids
            found = [ids[c.start : c.stop] for c in whole_calls(other)]
            fits = [x for x in found if len(x) <= self.longest and not np.array_equal(x, right_ids)]
            if fits:
                return fits[int(rng.integers(len(fits)))][:-1]
        return None

    def _with(self, example: Example, begin: int, right: int, wrong: np.ndarray) -> Example:
        """The example with `wrong` and <|back|> in the place of tokens `begin` up to `right`."""
        added = len(wrong) + 1
        # What is new takes its roles from what it stands before, whose step it belongs to.
        source = np.concatenate(
            [np.arange(begin), np.full(added, right), np.arange(right, len(example))]
        )
        ids, weights = example.ids[source], example.weights[source]
        ids[begin : begin + added] = [*wrong, BACK]
        weights[begin : begin + added] = [*[self.wrong] * len(wrong), self.back]
        outcomes = example.outcomes[source]
        outcomes[begin : begin + len(wrong)] = Outcome.FAILED
        weights[0] = 0.0
        return Example(ids, weights, example.roles[source], example.origins[source], outcomes)


@functools.lru_cache(maxsize=8)
def _open(path: str) -> TokenStore:
    return TokenStore.open(path)
