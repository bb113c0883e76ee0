"""Objectives: pure functions from a trajectory to ids and the loss weight of each.

Enters: a `Trajectory` (a whole one, or the piece of one that a row holds) and three integers: seed,
epoch and index. Leaves: an `Example`. The same four give the same example in any process, in any
order: all randomness is a counter-based generator keyed by the integers, so nothing has to be saved
for a run to resume. Each objective is a frozen dataclass, which is what configs bind.

A weight is that of *predicting* the token it stands at. Markers belong to the span that they open
or close: the weight of <|call|> is the call's, so choosing a call or an answer is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from agentx.tokenizer import SPECIAL_TOKENS
from agentx.trajectory import Outcome, Role, Span, Trajectory

_BOS = SPECIAL_TOKENS.index("<|bos|>")
_THOUGHT = SPECIAL_TOKENS.index("<|thought|>")
_CALL = SPECIAL_TOKENS.index("<|call|>")
_END = SPECIAL_TOKENS.index("<|end|>")
_FIM_PREFIX = SPECIAL_TOKENS.index("<|fim_prefix|>")
_FIM_SUFFIX = SPECIAL_TOKENS.index("<|fim_suffix|>")
_FIM_MIDDLE = SPECIAL_TOKENS.index("<|fim_middle|>")

# The spans that the assistant writes: only of these can a step have failed or recovered.
_ASSISTANT = (Role.THOUGHT, Role.CALL, Role.ARGUMENTS, Role.ANSWER)

# What a step is made of, after the thought behind it.
_STEP = (Role.CALL, Role.ARGUMENTS, Role.OBSERVATION)

# Streams of random numbers for one document that must not touch each other.
_CHOOSE, _CUT = 0, 1


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


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Next-token prediction with a float weight for every role, and a factor for how a step ended.

    `failed` and `recovered` multiply the weights of what the assistant wrote in such steps; what it
    was told (the error message, say) keeps the weight of its role. A failed call, what came of it,
    the call that recovers, what came of that, and the answer, with the default weights:

        token    <|bos|> <|user|>   go
        role        user     user user
        outcome       ok       ok   ok
        weight         0        0    0

        token    <|call|>     ls <|arguments|>         x   <|end|>
        role         call   call     arguments arguments arguments
        outcome    failed failed        failed    failed    failed
        weight          0      0             0         0         0

        token    <|observation|>          no     <|end|>
        role         observation observation observation
        outcome           failed      failed      failed
        weight                 0           0           0

        token     <|call|>        ls <|arguments|>         .   <|end|>
        role          call      call     arguments arguments arguments
        outcome  recovered recovered     recovered recovered recovered
        weight           1         1             1         1         1

        token    <|observation|>           2     <|end|>
        role         observation observation observation
        outcome               ok          ok          ok
        weight                 0           0           0

        token    <|answer|>      2 <|end|>
        role         answer answer  answer
        outcome          ok     ok      ok
        weight            1      1       1
    """

    text: float = 1.0
    system: float = 0.0
    user: float = 0.0
    thought: float = 1.0
    call: float = 1.0
    arguments: float = 1.0
    observation: float = 0.0
    answer: float = 1.0
    failed: float = 0.0
    recovered: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(f"NextToken.{name} is {weight}; a loss weight is 0 or more")

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """f32[roles, outcomes], the weight of a token by both."""
        table = np.zeros((len(Role), len(Outcome)), np.float32)
        for role in Role:
            table[role] = getattr(self, role.name.lower())
        table[_ASSISTANT, Outcome.FAILED] *= self.failed
        table[_ASSISTANT, Outcome.RECOVERED] *= self.recovered
        return table

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        return _weigh(trajectory, self._table)

    def room(self, trajectory: Trajectory) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class PlainText:
    """Next-token prediction, every token at weight 1.

    It is meant for text, and is the baseline on everything else:

        token    <|bos|> import   os <|end|>
        role        text   text text    text
        weight         0      1    1       1
    """

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        return _weigh(trajectory, np.ones((len(Role), len(Outcome)), np.float32))

    def room(self, trajectory: Trajectory) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class InfillCall:
    """Moves one tool call, or its name, or its arguments, to the end, to be filled in from there.

    The model learns which tool and which arguments from what came before *and* what came after. The
    rearrangement is prefix, suffix, middle (PSM of arXiv:2207.14255, on spans rather than on
    characters), and the middle ends with <|end|>. Of this document:

        <|bos|> <|user|> go <|call|> ls <|arguments|> x <|end|> <|answer|> 2 <|end|>

    The name cut out:

        token    <|bos|> <|fim_prefix|> <|user|> go <|call|>
        weight         0              0        0  0        1
        token    <|fim_suffix|> <|arguments|> x <|end|> <|answer|> 2 <|end|>
        weight                0             1 1       1          1 1       1
        token    <|fim_middle|> ls <|end|>
        weight                0  1       1

    The arguments:

        token    <|bos|> <|fim_prefix|> <|user|> go <|call|> ls <|arguments|>
        weight         0              0        0  0        1  1             1
        token    <|fim_suffix|> <|end|> <|answer|> 2 <|end|>
        weight                0       1          1 1       1
        token    <|fim_middle|> x <|end|>
        weight                0 1       1

    The whole call, which brings its own <|end|>:

        token    <|bos|> <|fim_prefix|> <|user|> go
        weight         0              0        0  0
        token    <|fim_suffix|> <|answer|> 2 <|end|>
        weight                0          1 1       1
        token    <|fim_middle|> <|call|> ls <|arguments|> x <|end|>
        weight                0        1  1             1 1       1

    rate: the probability that a document with a call to cut is rearranged; the others are left to
      `base`, which also sets all weights.
    whole, name, arguments: how often each cut is taken, relative to the others.
    context: multiplies the weights of what is not the middle, in documents that are rearranged.
    A call of weight 0 under `base` (a failed one, by default) is not cut.
    """

    rate: float = 0.5
    base: NextToken = NextToken()
    whole: float = 1.0
    name: float = 1.0
    arguments: float = 1.0
    context: float = 1.0

    def __post_init__(self) -> None:
        shares = {"whole": self.whole, "name": self.name, "arguments": self.arguments}
        _check_rates("InfillCall", self.rate, shares)
        if self.context < 0:
            raise ValueError(f"InfillCall.context is {self.context}; it must be 0 or more")

    def room(self, trajectory: Trajectory) -> int:
        """3 markers and an <|end|>, where there is a call."""
        return 4 if self.rate > 0 and self._calls(trajectory) else 0

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        example = self.base(trajectory, seed, epoch, index)
        rng = random_generator(seed, epoch, index, _CUT)
        if rng.random() >= self.rate:
            return example
        calls = self._calls(trajectory)
        if not calls:
            return example
        start, arguments, stop = calls[int(rng.integers(len(calls)))]
        cut = _draw(rng, (self.whole, self.name, self.arguments))
        begin = (start, start + 1, arguments + 1)[cut]
        end = (stop, arguments, stop - 1)[cut]
        return _fill_in(example, begin, end, self.context, end_of=end - 1 if cut else None)

    def _calls(self, trajectory: Trajectory) -> list[tuple[int, int, int]]:
        """Where each call that may be cut starts, where its arguments start, and where it stops.

        A call is one that the piece at hand holds from its marker to its <|end|>.
        """
        calls, column = [], 0
        spans = trajectory.spans
        for span, following in itertools.pairwise(spans):
            middle = column + len(span.ids)
            if (
                span.role is Role.CALL
                and following.role is Role.ARGUMENTS
                and span.ids[0] == _CALL
                and following.ids[-1] == _END
                and self.base._table[Role.CALL, span.outcome] > 0
                and self.base._table[Role.ARGUMENTS, span.outcome] > 0
            ):
                calls.append((column, middle, middle + len(following.ids)))
            column = middle
        return calls


@dataclasses.dataclass(frozen=True)
class InfillPlan:
    """Moves a thought to the end, to be filled in from what came of it; or the steps it led to.

    From what was done, and what came back, to the plan behind it: hindsight. From the plan, and how
    it ended, to the steps in between: planning. The rearrangement is that of `InfillCall`, and the
    middle ends with <|end|>. Of this document:

        <|bos|> <|user|> go <|thought|> os <|call|> ls <|arguments|> x <|end|>
        <|observation|> . <|end|> <|answer|> 2 <|end|>

    The thought cut out:

        token    <|bos|> <|fim_prefix|> <|user|> go
        weight         0              0        0  0
        token    <|fim_suffix|> <|call|> ls <|arguments|> x <|end|>
        weight                0        1  1             1 1       1
        token    <|observation|> . <|end|> <|answer|> 2 <|end|>
        weight                 0 0       0          1 1       1
        token    <|fim_middle|> <|thought|> os <|end|>
        weight                0           1  1       1

    The steps that it led to, up to the next thought, user or answer:

        token    <|bos|> <|fim_prefix|> <|user|> go <|thought|> os
        weight         0              0        0  0           1  1
        token    <|fim_suffix|> <|answer|> 2 <|end|>
        weight                0          1 1       1
        token    <|fim_middle|> <|call|> ls <|arguments|> x <|end|>
        weight                0        1  1             1 1       1
        token    <|observation|> . <|end|> <|end|>
        weight                 0 0       0       1

    rate: the probability that a document with a thought to cut is rearranged; the others are left
      to `base`, which also sets all weights.
    thought, steps: how often each cut is taken, relative to the other.
    context: multiplies the weights of what is not the middle, in documents that are rearranged.
    A thought of weight 0 under `base` (that of a failed step, by default) is not cut, and neither
    are steps that begin with a call of weight 0.
    """

    rate: float = 0.5
    base: NextToken = NextToken()
    thought: float = 1.0
    steps: float = 1.0
    context: float = 1.0

    def __post_init__(self) -> None:
        _check_rates("InfillPlan", self.rate, {"thought": self.thought, "steps": self.steps})
        if self.context < 0:
            raise ValueError(f"InfillPlan.context is {self.context}; it must be 0 or more")

    def room(self, trajectory: Trajectory) -> int:
        """3 markers and an <|end|>, where there is a thought to cut."""
        return 4 if self.rate > 0 and any(self._cuts(trajectory)) else 0

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        example = self.base(trajectory, seed, epoch, index)
        rng = random_generator(seed, epoch, index, _CUT)
        if rng.random() >= self.rate:
            return example
        kinds = self._cuts(trajectory)
        shares = [
            s if cuts else 0.0 for s, cuts in zip((self.thought, self.steps), kinds, strict=True)
        ]
        if not any(shares):
            return example
        cuts = kinds[_draw(rng, shares)]
        begin, end = cuts[int(rng.integers(len(cuts)))]
        return _fill_in(example, begin, end, self.context, end_of=begin)

    def _cuts(self, trajectory: Trajectory) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(begin, end) of each thought that may be cut, and of the steps after each that may be.

        A thought is one that the piece at hand holds from its marker, with something after it.
        """
        spans = trajectory.spans
        starts = [0, *itertools.accumulate(len(span.ids) for span in spans)]
        table = self.base._table
        thoughts, steps = [], []
        for at, span in enumerate(spans[:-1]):
            if span.role is not Role.THOUGHT or span.ids[0] != _THOUGHT:
                continue
            if self.thought and table[Role.THOUGHT, span.outcome] > 0:
                thoughts.append((starts[at], starts[at + 1]))
            following = itertools.takewhile(lambda s: s.role in _STEP, spans[at + 1 :])
            stop = at + 1 + sum(1 for _ in following)
            if (
                self.steps
                and stop > at + 1
                and spans[stop - 1].ids[-1] == _END
                and table[Role.CALL, spans[at + 1].outcome] > 0
            ):
                steps.append((starts[at + 1], starts[stop]))
        return thoughts, steps


def _check_rates(name: str, rate: float, shares: dict[str, float]) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}.rate is {rate}; it must be in [0, 1]")
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        *most, last = shares
        *values, value = shares.values()
        raise ValueError(
            f"{name}.{', '.join(most)} and {last} must be 0 or more and not all 0, got "
            f"{', '.join(map(str, values))} and {value}"
        )


def _draw(rng: np.random.Generator, shares: Sequence[float]) -> int:
    """An index, each as often as its share says."""
    sums = np.cumsum(shares)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


def _fill_in(
    example: Example, begin: int, end: int, context: float, *, end_of: int | None
) -> Example:
    """Prefix, suffix, middle, of which `ids[begin:end]` is the middle.

    context: multiplies the weights outside the middle. end_of: the token whose role and weight an
    <|end|> behind the middle has; None where the middle brings its own.
    """
    head = int(example.ids[0] == _BOS)
    prefix, suffix = np.arange(head, begin), np.arange(end, len(example))
    middle = np.arange(begin, end)
    # A marker takes role, origin and outcome from the token it stands before, or from the last.
    after = min(end, len(example) - 1)
    closing = np.array([] if end_of is None else [end_of], np.int64)
    markers = (
        (np.arange(head), None),
        (np.array([head]), _FIM_PREFIX),
        (prefix, None),
        (np.array([after]), _FIM_SUFFIX),
        (suffix, None),
        (np.array([min(begin, len(example) - 1)]), _FIM_MIDDLE),
        (middle, None),
        (closing, _END),
    )
    source = np.concatenate([columns for columns, _ in markers])
    ids, weights = example.ids[source], example.weights[source] * context
    column = 0
    for columns, marker in markers:
        if marker is not None and len(columns):
            ids[column] = marker
            weights[column] = 0.0
        column += len(columns)
    num_middle = len(middle) + len(closing)
    weights[-num_middle:] = example.weights[source[-num_middle:]]
    weights[0] = 0.0
    return Example(
        ids, weights, example.roles[source], example.origins[source], example.outcomes[source]
    )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Draws one of several objectives for each document and epoch, with the given probabilities.

    Mixture((PlainText(), InfillCall(1.0)), (0.9, 0.1)) leaves nine documents in ten plain.
    """

    objectives: tuple[Objective, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.objectives) != len(self.shares) or not self.shares:
            raise ValueError(
                f"a Mixture of {len(self.objectives)} objectives has {len(self.shares)} shares; "
                "give one for each"
            )
        if min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shares must be 0 or more and not all 0, got {self.shares}")

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        chosen = _draw(random_generator(seed, epoch, index, _CHOOSE), self.shares)
        return self.objectives[chosen](trajectory, seed, epoch, index)

    def room(self, trajectory: Trajectory) -> int:
        return max(objective.room(trajectory) for objective in self.objectives)


def _per_token(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids i32[n] and roles, origins, outcomes u8[n]."""
    lengths = [len(span.ids) for span in spans]
    fields = np.array([(s.role, s.origin, s.outcome) for s in spans], np.uint8)
    roles, origins, outcomes = np.repeat(fields.reshape(-1, 3).T, lengths, axis=1)
    return np.concatenate([s.ids for s in spans]), roles, origins, outcomes


def _weigh(trajectory: Trajectory, table: np.ndarray) -> Example:
    """Weights by role and outcome; `table` is f32[roles, outcomes]."""
    if len(trajectory) == 0:
        raise ValueError("there is no token in this trajectory")
    ids, roles, origins, outcomes = _per_token(trajectory.spans)
    weights = table[roles, outcomes]
    weights[0] = 0.0
    return Example(ids.astype(np.int32), weights, roles, origins, outcomes)
