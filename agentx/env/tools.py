"""Tools, and the environment that lets a policy call them until it answers.

A tool is a spec and a coroutine. What it raises as `ToolError` is an observation like any other:
the policy reads it and may recover. A tool that does not come back in time is a failed call, not a
hang.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agentx.env.base import CallRecord, Observation, Rubric, Task
from agentx.trajectory import Message, Outcome, ToolCall, ToolSpec

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "any": (object,),
}


class ToolError(Exception):
    """A failure that the policy should read. The text is the observation."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """`run` takes the arguments by name and returns the observation's text.

    It must give way to others while it waits (asyncio.to_thread where it would block), or else no
    time-out can reach it.
    """

    spec: ToolSpec
    run: Callable[..., Awaitable[str]]


def check_arguments(spec: ToolSpec, arguments: dict[str, Any]) -> None:
    """Raises ToolError where the arguments are not what `spec` declares."""
    wanted = [p.name for p in spec.parameters]
    missing = [name for name in wanted if name not in arguments]
    if missing:
        raise ToolError(f"error: missing argument {missing[0]}")
    extra = [name for name in arguments if name not in wanted]
    if extra:
        raise ToolError("error: too many arguments")
    for parameter in spec.parameters:
        value = arguments[parameter.name]
        right = isinstance(value, _PYTHON_TYPES[parameter.type])
        if not right or (isinstance(value, bool) and parameter.type not in ("boolean", "any")):
            raise ToolError(f"error: {parameter.name} is no {parameter.type}")


class ToolEnv:
    """Tools are called one a message until the policy answers or has used `max_calls`.

    A message that cannot be read, and a call of an unknown tool, are failed calls with an error for
    an observation. `tool_timeout_s` bounds every call in wall-clock seconds.
    """

    def __init__(
        self, tools: Sequence[Tool], rubric: Rubric, *, max_calls: int, tool_timeout_s: float
    ):
        if max_calls < 1 or tool_timeout_s <= 0:
            raise ValueError(
                f"max_calls must be at least 1 and tool_timeout_s positive, "
                f"got {max_calls} and {tool_timeout_s}"
            )
        self.tools = tuple(t.spec for t in tools)
        self.calls: list[CallRecord] = []
        self._tools = {t.spec.name: t for t in tools}
        self._rubric = rubric
        self._max_calls = max_calls
        self._tool_timeout_s = tool_timeout_s
        self._task: Task | None = None
        self._messages: list[Message] = []

    async def reset(self, task: Task) -> list[Message]:
        self._task = task
        self.calls = []
        self._messages = [Message("user", task.prompt)]
        return list(self._messages)

    async def step(self, message: Message) -> Observation:
        assert self._task is not None, "step before reset"
        self._messages.append(message)
        if not message.malformed and not message.tool_calls:
            return self._finish(())
        record = await self._call(message)
        self.calls.append(record)
        outcome = Outcome.FAILED if record.failed else Outcome.OK
        reply = Message("tool", record.observation, outcome=outcome)
        self._messages.append(reply)
        if len(self.calls) >= self._max_calls:
            return self._finish((reply,))
        return Observation((reply,))

    async def _call(self, message: Message) -> CallRecord:
        if message.malformed:
            text = f"error: malformed call, {message.malformed}"
            return CallRecord("", {}, text, valid=False, failed=True)
        call = message.tool_calls[0]
        tool = self._tools.get(call.name)
        if tool is None:
            return self._failed(call, "error: no such tool", valid=False)
        try:
            check_arguments(tool.spec, call.arguments)
        except ToolError as error:
            return self._failed(call, str(error), valid=False)
        try:
            text = await asyncio.wait_for(tool.run(**call.arguments), self._tool_timeout_s)
        except ToolError as error:
            return self._failed(call, str(error), valid=True)
        except TimeoutError:
            text = f"error: {call.name} timed out after {self._tool_timeout_s:g} s"
            return self._failed(call, text, valid=True)
        return CallRecord(call.name, call.arguments, text, valid=True, failed=False)

    @staticmethod
    def _failed(call: ToolCall, text: str, *, valid: bool) -> CallRecord:
        return CallRecord(call.name, call.arguments, text, valid=valid, failed=True)

    def _finish(self, messages: tuple[Message, ...]) -> Observation:
        assert self._task is not None
        reward, parts = self._rubric.score(self._task, self._messages)
        return Observation(messages, reward, done=True, info={"rewards": parts})
