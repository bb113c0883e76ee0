"""Filters that judge recorded runs: are the calls valid, and what was the run worth?

Texts are no runs: they pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from agentx.data.curate.base import Document, Taken
from agentx.data.formats import TextDocument
from agentx.trajectory import Message, ToolCall, ToolSpec

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list, tuple),
}


@dataclasses.dataclass(frozen=True)
class ValidCalls:
    """Takes conversations with a call that the tools on offer do not allow, or without its result.

    With the tool `open(path: string, line: integer)`:

        open(path="a.py", line=3), result     kept
        open(path="a.py"), result             kept: it is not known which arguments a tool needs
        open(path="a.py", line=None), result  kept: null stands for an argument that is left out
        close(), result                       taken: a call of an unknown tool
        open(file="a.py"), result             taken: an unknown argument
        open(path="a.py", line="3"), result   taken: an argument of a wrong type
        open(path="a.py"), no result          taken: a call without a result, unless it comes last
        result                                taken: a result without a call
        what could not be read as a message   taken: a malformed message
    """

    def __call__(self, document: Document) -> Document | Taken:
        if isinstance(document, TextDocument):
            return document
        tools = {tool.name: tool for tool in document.tools}
        for number, message in enumerate(document.messages):
            fault = _fault(message, tools)
            if fault:
                return Taken(fault, (f"message {number}",))
        fault = _unmatched(document.messages)
        return Taken(fault) if fault else document


@dataclasses.dataclass(frozen=True)
class MinReward:
    """Takes runs of a reward under `threshold`; `no_reward` says what becomes of those without one.

    MinReward(0.5), MinReward(0.5, no_reward="keep"):

        reward 0.5    kept                            kept
        reward 0      taken: reward under 0.5         taken: reward under 0.5
        none          taken: no reward                kept
    """

    threshold: float = 1.0
    no_reward: Literal["take", "keep"] = "take"

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"MinReward.threshold is {self.threshold}; it must be finite")
        if self.no_reward not in ("take", "keep"):
            raise ValueError(f"MinReward.no_reward is {self.no_reward!r}; it is 'take' or 'keep'")

    def __call__(self, document: Document) -> Document | Taken:
        if isinstance(document, TextDocument):
            return document
        if document.reward is None:
            return document if self.no_reward == "keep" else Taken("no reward")
        if document.reward < self.threshold:
            return Taken(f"reward under {self.threshold:g}")
        return document


def _fault(message: Message, tools: dict[str, ToolSpec]) -> str:
    if message.malformed:
        return "a malformed message"
    return next(filter(None, (_call_fault(call, tools) for call in message.tool_calls)), "")


def _call_fault(call: ToolCall, tools: dict[str, ToolSpec]) -> str:
    if call.name not in tools:
        return "a call of an unknown tool"
    types = {parameter.name: parameter.type for parameter in tools[call.name].parameters}
    if not set(call.arguments) <= set(types):
        return "an unknown argument"
    if not all(_fits(value, types[name]) for name, value in call.arguments.items()):
        return "an argument of a wrong type"
    return ""


def _fits(value: Any, json_type: str) -> bool:
    if value is None or json_type == "any":
        return True
    if isinstance(value, bool):
        return json_type == "boolean"
    if json_type == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON has one kind of number: 3.0 is an integer
    return isinstance(value, _TYPES[json_type])


def _unmatched(messages: Sequence[Message]) -> str:
    """What is wrong with the order of calls and results."""
    waiting = 0
    for message in messages:
        if message.role == "tool":
            if waiting == 0:
                return "a result without a call"
            waiting -= 1
            continue
        if waiting:
            return "a call without a result"
        waiting = len(message.tool_calls)
    return ""
