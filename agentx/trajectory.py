"""What an agent did, as messages and as spans of token ids. No JAX here.

A conversation is a list of `Message`s: what environments and datasets speak. A `Trajectory` is the
same thing as the model sees it: spans of token ids, each with a role (what kind of text), an origin
(who wrote it) and an outcome (did the step work). Objectives turn these into loss weights.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np


class Role(enum.IntEnum):
    """What kind of text a span is. The values are stored on disk: never renumber."""

    TEXT = 0
    SYSTEM = 1
    USER = 2
    THOUGHT = 3
    CALL = 4
    ARGUMENTS = 5
    OBSERVATION = 6
    ANSWER = 7


class Origin(enum.IntEnum):
    """Who wrote a span. Stored on disk: never renumber."""

    DATA = 0
    SAMPLED = 1
    ENVIRONMENT = 2


class Outcome(enum.IntEnum):
    """How the step that a span belongs to ended. Stored on disk: never renumber.

    RECOVERED marks the first successful step after one or more failed ones.
    """

    OK = 0
    FAILED = 1
    RECOVERED = 2


class Markers(NamedTuple):
    """The ids of the markers, which each tokenizer has somewhere else; by default, as ours has."""

    pad: int = 0
    bos: int = 1
    system: int = 2
    user: int = 3
    thought: int = 4
    call: int = 5
    arguments: int = 6
    sep: int = 7
    end: int = 8
    observation: int = 9
    answer: int = 10
    fim_prefix: int = 11
    fim_suffix: int = 12
    fim_middle: int = 13
    back: int = 14

    @classmethod
    def of(cls, special: Mapping[str, int]) -> Markers:
        """From the ids by name, as `Tokenizer.special` has them: {"<|pad|>": 0, ...}."""
        return cls(*(special[f"<|{field}|>"] for field in cls._fields))


OUR_MARKERS = Markers()


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a tool. `type` is a JSON-schema type name, or "any": several, or unknown."""

    name: str
    type: Literal["string", "integer", "number", "boolean", "object", "array", "any"] = "string"


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    """A tool as the model is told of it."""

    name: str
    description: str
    parameters: tuple[Parameter, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool by name. `arguments` keeps the order in which they were written."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. `content` of an assistant without a call is its answer.

    `outcome` says, on an assistant message, how the call went and, on a tool message, whether it
    reports a failure. `malformed` names what is wrong with an assistant message that could not be
    read as a call or an answer.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    outcome: Outcome = Outcome.OK
    malformed: str = ""


@dataclasses.dataclass(slots=True)
class Span:
    """Consecutive tokens of one role, origin and outcome. Shared, so never written to.

    ids: i32[n]. logprobs: f32[n], the sampler's, for sampled spans only. weight_version: the number
    of the policy's weights that sampled it, -1 where nobody did.
    """

    # Not frozen: that costs a microsecond a span, where a short document takes 50 in all.
    role: Role
    ids: np.ndarray
    origin: Origin = Origin.DATA
    outcome: Outcome = Outcome.OK
    logprobs: np.ndarray | None = None
    weight_version: int = -1

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.ids):
            raise ValueError(f"span of {len(self.ids)} ids has {len(self.logprobs)} logprobs")


class SpanTable(Sequence[Span]):
    """Spans as a table, as a store keeps them; each becomes a `Span` when it is asked for.

    ids: i32[tokens]. ends: where each span ends among them, i64[spans]. roles, origins, outcomes:
    u8[spans].
    """

    def __init__(
        self,
        ids: np.ndarray,
        ends: np.ndarray,
        roles: np.ndarray,
        origins: np.ndarray,
        outcomes: np.ndarray,
    ):
        self.ids, self.ends = ids, ends
        self.role, self.origin, self.outcome = roles, origins, outcomes

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each span, i64[spans]."""
        return np.diff(self.ends, prepend=0)

    @functools.cached_property
    def _spans(self) -> list[Span]:
        made, start = [], 0
        columns = (self.ends, self.role, self.origin, self.outcome)
        for stop, role, origin, outcome in zip(*(c.tolist() for c in columns), strict=True):
            ids = self.ids[start:stop]
            made.append(Span(_ROLES[role], ids, _ORIGINS[origin], _OUTCOMES[outcome]))
            start = stop
        return made

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> list[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | list[Span]:
        return self._spans[index]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)


# An enum's own constructor costs more than the rest of a span.
_ROLES, _ORIGINS, _OUTCOMES = list(Role), list(Origin), list(Outcome)


@dataclasses.dataclass(slots=True)
class Trajectory:
    """Spans in order, with the reward of the whole and what the environment said of it.

    `task_id` names the task, `group` the set of trajectories that share a prompt.
    `num_prompt_spans` spans at the start come before the first token of the assistant. `markers`
    are those of the tokenizer that made the ids. `experts`, i32[len(self) - 1, L, k], are those
    that each token but the last took when a policy with experts sampled it, of the L layers that
    have any.
    """

    spans: Sequence[Span]
    reward: float = 0.0
    task_id: str = ""
    group: int = 0
    num_prompt_spans: int = 0
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    markers: Markers = OUR_MARKERS
    experts: np.ndarray | None = None

    def __len__(self) -> int:
        if isinstance(self.spans, SpanTable):
            return len(self.spans.ids)
        return sum(len(s.ids) for s in self.spans)

    @property
    def ids(self) -> np.ndarray:
        """All token ids, i32[len(self)]. Not to be written to: they may be a store's own."""
        if isinstance(self.spans, SpanTable):
            return self.spans.ids
        if not self.spans:
            return np.zeros(0, np.int32)
        return np.concatenate([s.ids for s in self.spans]).astype(np.int32)

    def per_token(self, field: Literal["role", "origin", "outcome"]) -> np.ndarray:
        """One attribute of the spans, repeated for each of their tokens: u8[len(self)]."""
        if isinstance(self.spans, SpanTable):
            column: np.ndarray = getattr(self.spans, field)
            return column.repeat(self.spans.lengths)
        values = [np.full(len(s.ids), int(getattr(s, field)), np.uint8) for s in self.spans]
        return np.concatenate(values) if values else np.zeros(0, np.uint8)

    @property
    def sampler_logprobs(self) -> np.ndarray:
        """The sampler's log-probability of each token, 0 where it did not sample: f32[n]."""
        if isinstance(self.spans, SpanTable):
            return np.zeros(len(self), np.float32)
        values = [
            s.logprobs if s.logprobs is not None else np.zeros(len(s.ids), np.float32)
            for s in self.spans
        ]
        return np.concatenate(values).astype(np.float32) if values else np.zeros(0, np.float32)
