"""Conversations, and our own JSON format for them.

A conversation in JSON is an object like this one (what is empty may be left out, but for a call's
arguments and a tool's description; an outcome is "ok", "failed" or "recovered"):

    {"messages": [
        {"role": "user", "content": "Where is `walk`?"},
        {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {"name": "walk"}}]},
        {"role": "tool", "content": "os.py"},
        {"role": "assistant", "content": "os.py"}],
     "tools": [
        {"name": "find", "description": "find a function",
         "parameters": [{"name": "name", "type": "string"}]}],
     "reward": 1.0,
     "id": "walk/7"}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from agentx.data.formats.reading import kind
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and the tools that were on offer. `name` says where it came from.

    What is read from a file has its place there for a name; what is written has its name for an id.
    reward: of the whole, None where nobody gave one.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    name: str = ""
    reward: float | None = None

    @property
    def num_characters(self) -> int:
        """Of all that is said and called; those of the tools on offer are not counted."""
        arguments = (c.arguments.values() for m in self.messages for c in m.tool_calls)
        return sum(len(m.thought) + len(m.content) for m in self.messages) + sum(
            len(str(value)) for values in arguments for value in values
        )


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """The JSON form, without the fields that are empty; an outcome is its name in lower case."""
    messages = []
    for message in conversation.messages:
        fields = {k: v for k, v in dataclasses.asdict(message).items() if v}
        if "outcome" in fields:
            fields["outcome"] = message.outcome.name.lower()
        messages.append(fields)
    tools = [dataclasses.asdict(tool) for tool in conversation.tools]
    reward = {} if conversation.reward is None else {"reward": conversation.reward}
    name = {"id": conversation.name} if conversation.name else {}
    return {"messages": messages, "tools": tools, **reward, **name}


def conversation_from_dict(record: dict[str, Any], name: str = "") -> Conversation:
    """Reads the JSON form. Raises ValueError that names the message or tool and the field."""
    messages = [
        _message(fields, f"message {i}") for i, fields in enumerate(list_of(record, "messages"))
    ]
    tools = []
    for i, fields in enumerate(list_of(record, "tools", required=False)):
        where = f"tool {i}"
        parameters = tuple(
            _build(Parameter, p, f"{where}, parameter {j}")
            for j, p in enumerate(list_of(fields, "parameters", where, required=False))
        )
        tools.append(_build(ToolSpec, {**fields, "parameters": parameters}, where))
    return Conversation(tuple(messages), tuple(tools), name, reward_of(record))


def agentx_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """The same of a file, where each observation must have a call that it answers.

    A message that could not be read as a call (`malformed`) counts as one.
    """
    conversation = conversation_from_dict(record, name)
    waiting = 0
    for number, message in enumerate(conversation.messages):
        if message.role != "tool":
            waiting = len(message.tool_calls) or bool(message.malformed)
        elif not waiting:
            raise ValueError(f"message {number}: this observation answers no call before it")
        else:
            waiting -= 1
    return conversation


def reward_of(record: dict[str, Any]) -> float | None:
    """The number under "reward", if any. Raises ValueError where it is none, or not finite."""
    reward = record.get("reward")
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise ValueError(f"reward must be a number, not a {kind(reward)}")
    if not math.isfinite(reward):
        raise ValueError(f"reward is {reward}; it must be finite")
    return float(reward)


def _message(fields: Any, where: str) -> Message:
    calls = []
    for i, call in enumerate(list_of(fields, "tool_calls", where, required=False)):
        calls.append(_build(ToolCall, call, f"{where}, tool call {i}"))
    outcome = fields.get("outcome", "ok")
    names = [o.name.lower() for o in Outcome]
    if outcome not in names:
        raise ValueError(f"{where}: outcome is {outcome!r}; it must be one of {', '.join(names)}")
    built = {**fields, "tool_calls": tuple(calls), "outcome": Outcome(names.index(outcome))}
    return _build(Message, built, where)


def list_of(fields: Any, key: str, where: str = "", *, required: bool = True) -> Sequence[Any]:
    """The list under `key`, [] where it is missing and may be. Raises ValueError."""
    prefix = f"{where}: " if where else ""
    if not isinstance(fields, dict):
        raise ValueError(f"{prefix}this is no object but a {kind(fields)}")
    value = fields.get(key, None if required else [])
    if not isinstance(value, list):
        raise ValueError(f"{prefix}there is no list {key!r}")
    return value


def _build(cls: type[T], fields: Any, where: str) -> T:
    """A dataclass from a JSON object: unknown and missing fields and wrong types are named."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: this is no object but a {kind(fields)}")
    types = _FIELD_TYPES[cls]
    for key, value in fields.items():
        if key not in types:
            raise ValueError(f"{where}: there is no field {key!r}; there are {', '.join(types)}")
        expected = types[key]
        choices = get_args(expected)
        if choices and isinstance(choices[0], str):
            if value not in choices:
                raise ValueError(
                    f"{where}: {key} is {value!r}; it must be one of {', '.join(choices)}"
                )
        elif expected is str and not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a string, not a {kind(value)}")
        elif key == "arguments" and not isinstance(value, dict):
            raise ValueError(f"{where}: {key} must be an object, not a {kind(value)}")
    try:
        return cls(**fields)
    except TypeError:
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in fields]
        raise ValueError(f"{where}: there is no {' and no '.join(map(repr, missing))}") from None


_FIELD_TYPES: dict[type, dict[str, Any]] = {
    cls: get_type_hints(cls) for cls in (Message, ToolCall, ToolSpec, Parameter)
}
