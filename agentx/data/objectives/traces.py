"""Texts with the reasoning behind them, at a share of the tokens that is stated."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from agentx.data.objectives.base import (
    TRACE,
    Example,
    Objective,
    check_share,
    check_steady,
    random_generator,
)
from agentx.data.objectives.calls import open_store
from agentx.data.objectives.offer import with_ids
from agentx.data.objectives.weights import NextToken
from agentx.trajectory import Role, Span, Trajectory

_NEXT_TOKEN = NextToken()


@dataclasses.dataclass(frozen=True)
class TraceAugment:
    """A text followed by its reasoning trace, or preceded by it, or without (arXiv:2509.20186).

    A document of the store is a text span, and a thought span behind it, which holds the <|end|> of
    both. As it is:

        token    <|bos|> import   os <|thought|>      go <|end|>
        role        text   text text     thought thought thought
        weight         0      1    1           1       1       1

    With the trace first, and an <|end|> for each:

        token    <|bos|> <|thought|>      go <|end|> import   os <|end|>
        role        text     thought thought thought   text text    text
        weight         0           1       1       1      1    1       1

    Without it:

        token    <|bos|> import   os <|end|>
        role        text   text text    text
        weight         0      1    1       1

    store: the token store that the documents are from; the share is reckoned from its lengths. It
      holds texts, with and without a trace, and nothing else.
    share: the share of all tokens that are a trace's. Traces are kept with the probability that
      makes it so on average, by document, whatever its length; more than the store has is refused.
    before: the share of the traces kept that come first.
    base: what is done with the document then; it sets the weights: `NextToken.thought` is that of
      a trace.
    Of a document that is cut over several rows, each piece keeps its part of the trace or not, and
    the order stays. The place of a trace that is left out stays empty in the row: a share much
    below what the store has costs rows.
    """

    store: str
    share: float
    before: float = 0.0
    base: Objective = _NEXT_TOKEN

    def __post_init__(self) -> None:
        check_steady("TraceAugment.base", [self.base])
        if not 0 <= self.share < 1:
            raise ValueError(f"TraceAugment.share is {self.share}; it must be in [0, 1)")
        check_share("TraceAugment.before", self.before)

    @property
    def kept(self) -> float:
        """The probability that a trace is kept."""
        texts, traces = _tokens(self.store)
        if self.share * (texts + traces) > traces:
            raise ValueError(
                f"TraceAugment.share is {self.share}, but traces are only "
                f"{traces / (texts + traces):.4f} of the tokens of {self.store}"
            )
        return self.share / (1 - self.share) * texts / traces if traces else 0.0

    def room(self, trajectory: Trajectory) -> int:
        """The most that `base` asks for, wherever the trace is, and an <|end|> to part the two."""
        if not _has_trace(trajectory):
            return self.base.room(trajectory)
        forms = [trajectory, _without_trace(trajectory)]
        if self.before > 0:
            forms.append(_trace_first(trajectory))
        return max(map(self.base.room, forms)) + (self.before > 0)

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        if _has_trace(trajectory):
            rng = random_generator(seed, epoch, index, TRACE)
            if rng.random() >= self.kept:
                trajectory = _without_trace(trajectory)
            elif rng.random() < self.before:
                trajectory = _trace_first(trajectory)
        return self.base(trajectory, seed, epoch, index)


@functools.lru_cache(maxsize=8)
def _tokens(path: str) -> tuple[int, int]:
    """How many tokens of a store are texts', and how many traces'."""
    counts = open_store(path).tokens_by_role().sum(axis=(0, 2))
    texts, traces = int(counts[Role.TEXT]), int(counts[Role.THOUGHT])
    if texts + traces < counts.sum():
        raise ValueError(
            f"{path} holds more than texts and traces, so TraceAugment cannot tell their shares: "
            "give it a store of their own"
        )
    return texts, traces


def _has_trace(trajectory: Trajectory) -> bool:
    roles = {span.role for span in trajectory.spans}
    return Role.THOUGHT in roles and roles <= {Role.TEXT, Role.THOUGHT}


def _without_trace(trajectory: Trajectory) -> Trajectory:
    """The texts alone, or, of a piece that holds none, a token of nothing to predict."""
    texts = [span for span in trajectory.spans if span.role is Role.TEXT]
    if texts:
        texts[-1] = _ended(texts[-1], trajectory.markers.end)
    else:
        texts = [with_ids(trajectory.spans[0], trajectory.spans[0].ids[:1])]
    return dataclasses.replace(trajectory, spans=texts)


def _trace_first(trajectory: Trajectory) -> Trajectory:
    """<|bos|>, trace, text; as it was, where the piece at hand does not hold both whole."""
    text, *others = trajectory.spans
    markers = trajectory.markers
    if text.ids[0] != markers.bos or len(others) != 1 or others[0].ids[-1] != markers.end:
        return trajectory
    rest = _ended(with_ids(text, text.ids[1:]), markers.end)
    return dataclasses.replace(trajectory, spans=[with_ids(text, text.ids[:1]), *others, rest])


def _ended(text: Span, end: int) -> Span:
    """The text with an <|end|>."""
    return text if end in text.ids[-1:] else with_ids(text, np.append(text.ids, end))
