"""What an environment is: tasks in, messages out, a reward at the end. It never sees a token.

The rollout is a while loop: `reset` sets the state up and gives the first messages; until `done`,
the policy writes a message and `step` answers it. The same environment serves evaluation, synthetic
data and RL. One `Env` object is one episode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from agentx.trajectory import Message, ToolSpec


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt with what is needed to judge its answer.

    `seed` fixes everything that an episode of this task draws (a slow tool, say), so that all the
    episodes of a group meet the same world.
    """

    id: str
    prompt: str
    answer: str
    kind: str = ""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an environment says to an assistant message. `reward` counts once `done` is true."""

    messages: tuple[Message, ...]
    reward: float = 0.0
    done: bool = False
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """One call as it went. `valid`: the tool was on offer and its arguments were as declared."""

    name: str
    arguments: dict[str, Any]
    observation: str
    valid: bool
    failed: bool


class Env(Protocol):
    """One episode. `calls` is the record of its tool calls so far."""

    tools: tuple[ToolSpec, ...]
    calls: list[CallRecord]

    async def reset(self, task: Task) -> list[Message]:
        """Sets the episode up; returns the messages that the policy sees first."""
        ...

    async def step(self, message: Message) -> Observation:
        """Answers one assistant message."""
        ...


class TaskSet(Protocol):
    """Tasks by number, and the environment to try them in."""

    def __len__(self) -> int: ...

    def task(self, index: int, seed: int) -> Task:
        """Task `index` with the world drawn from `seed`."""
        ...

    def env(self) -> Env:
        """A fresh episode."""
        ...


RewardFunction = Callable[[Task, Sequence[Message]], float]


class Rubric:
    """A reward as a weighted sum of named functions of (task, messages), each logged by itself."""

    def __init__(self, **functions: tuple[float, RewardFunction]):
        if not functions:
            raise ValueError("a rubric needs at least one reward function")
        self._functions = functions

    def score(self, task: Task, messages: Sequence[Message]) -> tuple[float, dict[str, float]]:
        """The weighted sum and the value of every function."""
        values = {name: float(fn(task, messages)) for name, (_, fn) in self._functions.items()}
        total = sum(weight * values[name] for name, (weight, _) in self._functions.items())
        return total, values
