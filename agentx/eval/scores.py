"""From finished episodes to scores, each with its 95 % interval.

    EpisodeResult ... -> score_episodes -> {"success": Score, "valid_call": Score, ...}

Every score is a proportion, a count out of a total, so every interval is a proportion's too.
Left out on purpose: rewards other than success, which differ from one environment to the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

_Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """What the scores need to know of one episode.

    calls: (name, arguments as JSON, observation) of every call, in order; a call that could not be
      read stands there with the name "" and its raw text as arguments.
    num_valid_calls: calls that parse, name a tool on offer and give it the right arguments.
    num_failed_calls: calls that the environment answered with a failure, for whatever reason.
    """

    task_id: str
    success: bool
    num_calls: int
    num_valid_calls: int
    num_failed_calls: int
    calls: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_valid_calls", "num_failed_calls"):
            if not 0 <= getattr(self, name) <= self.num_calls:
                raise ValueError(
                    f"episode {self.task_id!r} has {name} {getattr(self, name)}, "
                    f"which must be between 0 and its num_calls {self.num_calls}"
                )

    @property
    def failed(self) -> bool:
        """Whether at least one call failed."""
        return self.num_failed_calls > 0

    @property
    def looped(self) -> bool:
        """Whether the agent went round in circles.

        True where the same call got the same observation three times in a row (A A A), or two did
        so by turns, twice (A B A B). One retry is no loop, nor is a repeat that is answered
        differently.
        """
        c = self.calls
        aaa = any(c[i] == c[i + 1] == c[i + 2] for i in range(len(c) - 2))
        abab = any(c[i : i + 2] == c[i + 2 : i + 4] for i in range(len(c) - 3))
        return aaa or abab


@dataclasses.dataclass(frozen=True)
class Score:
    """`count` of `total`: value = count / total (NaN if total is 0), its interval [low, high]."""

    name: str
    value: float
    low: float
    high: float
    count: int
    total: int

    def to_json(self) -> dict[str, Any]:
        """What results.json holds of a score: {"value", "low", "high", "count", "total"}."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        fields["value"] = self.value if self.total else None
        return fields

    @classmethod
    def from_json(cls, name: str, fields: Mapping[str, Any]) -> Score:
        """The score that `to_json` wrote."""
        return make_score(name, fields["count"], fields["total"])


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two proportions, after - before, with its 95 % interval [low, high]."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class MeanScore:
    """The mean of one score over several runs, with its 95 % interval [low, high]."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): honest near 0 and 1, and for small n.

    `wilson_interval(129, 256)` is about (0.443, 0.565). Of no trials it knows nothing: (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    share, z = successes / n, _Z_95
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n successes the bound is 0 or 1 exactly, which rounding would miss by an ulp.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def make_score(name: str, count: int, total: int) -> Score:
    """A score and its Wilson interval."""
    low, high = wilson_interval(count, total)
    return Score(name, count / total if total else math.nan, low, high, count, total)


def score_episodes(episodes: Sequence[EpisodeResult]) -> dict[str, Score]:
    """The scores of a set of episodes, by name.

    success     of all episodes, those that solved their task
    valid_call  of all calls, those that parse, name an offered tool and fit its parameters
    recovery    of the episodes in which a call failed, those that solved their task all the same
    loop        of all episodes, those that went round in circles (`EpisodeResult.looped`)
    """
    failed = [e for e in episodes if e.failed]
    scores = (
        make_score("success", sum(e.success for e in episodes), len(episodes)),
        make_score(
            "valid_call",
            sum(e.num_valid_calls for e in episodes),
            sum(e.num_calls for e in episodes),
        ),
        make_score("recovery", sum(e.success for e in failed), len(failed)),
        make_score("loop", sum(e.looped for e in episodes), len(episodes)),
    )
    return {score.name: score for score in scores}


def cut_short(num_truncated: int, num_crashed: int) -> str:
    """What kept episodes from their end, in words; "" where nothing did."""
    counts = {"ran out of context": num_truncated, "crashed": num_crashed}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def paired_difference(
    before: Sequence[EpisodeResult],
    after: Sequence[EpisodeResult],
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
) -> Difference:
    """How much success rose from one stage to another on the same tasks.

    The interval is the percentile bootstrap over tasks, each task taking both its episodes along.
    Raises ValueError where the two do not hold one episode each of the same tasks.
    """
    success_before = {e.task_id: e.success for e in before}
    success_after = {e.task_id: e.success for e in after}
    for episodes, by_task in ((before, success_before), (after, success_after)):
        if len(episodes) != len(by_task):
            raise ValueError(f"{len(episodes)} episodes of {len(by_task)} tasks: want one per task")
    if success_before.keys() != success_after.keys():
        unpaired = sorted(success_before.keys() ^ success_after.keys())
        raise ValueError(
            f"{len(unpaired)} tasks have an episode in only one stage, such as {unpaired[0]!r}"
        )
    n = len(success_before)
    if n == 0:
        raise ValueError("no episodes to compare")
    changes = [int(success_after[task]) - int(success_before[task]) for task in success_before]
    lost, gained = changes.count(-1), changes.count(1)
    # A task changes by -1, 0 or +1, so drawing n tasks with replacement is one multinomial draw.
    draws = np.random.default_rng(seed).multinomial(
        n, [lost / n, (n - lost - gained) / n, gained / n], size=num_resamples
    )
    low, high = np.quantile((draws[:, 2] - draws[:, 0]) / n, [0.025, 0.975])
    return Difference((gained - lost) / n, float(low), float(high))


def unpaired_difference(before: Score, after: Score) -> Difference:
    """The difference of two scores from separate sets of episodes.

    The interval is Newcombe's (1998, method 10), made of the two Wilson intervals.
    """
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Difference(value, low, high)


def mean_of_runs(scores: Sequence[Score]) -> MeanScore:
    """The mean of a score over runs that differ in their seed and were asked the same.

    The interval answers for other seeds and for other questions: its half-width is the root of the
    sum of two squares, Student's t over the runs and Wilson's half-width over the questions of one
    run, which are no more for being asked of every run. Of a single run it is (0, 1).
    """
    value = float(np.mean([score.value for score in scores]))
    total = min(score.total for score in scores)
    low, high = wilson_interval(round(value * total), total)
    over_runs = _t_half_width([score.value for score in scores])
    return MeanScore(
        value,
        max(0.0, value - math.hypot(over_runs, max(value - low, 0.0))),
        min(1.0, value + math.hypot(over_runs, max(high - value, 0.0))),
    )


def paired_runs_difference(before: Sequence[Score], after: Sequence[Score]) -> Difference:
    """How much a score rose from one kind of run to another, seed by seed.

    The interval is Student's t over the differences, each of two runs that were asked the same: it
    answers for other seeds, not for other questions. Of a single pair it is (-1, 1).
    """
    changes = [b.value - a.value for a, b in zip(before, after, strict=True)]
    value, half = float(np.mean(changes)), _t_half_width(changes)
    return Difference(value, max(-1.0, value - half), min(1.0, value + half))


def _t_half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of a few values, infinite for a single one."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(n)
