"""Recorded episodes, as benchmarks and agents leave them.

Each function takes one JSON object and gives a `Conversation` with its reward and outcomes, or
raises ValueError in a sentence that names the place in it.

    tau_bench  an array of {"task_id", "reward", "traj": OpenAI messages}; a result that begins with
               "Error" is a failure
    swe_agent  a .traj file: {"history": messages, "info"}; where a message has an `action` in place
               of calls, that is a call of `bash`, and the user's next message is its result
    intercode  an object of {"query", "turn_history": {"actions", "observations", "rewards",
               "valid_action"}}; an action that is not valid is a failure; the reward is the highest
    verifiers  a line of results.jsonl: {"prompt", "completion", "reward"}, of OpenAI messages
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from agentx.data.formats.chat import (
    content_of,
    matched,
    one_type,
    openai_messages,
    openai_tools,
    type_of,
)
from agentx.data.formats.native import Conversation, list_of, reward_of
from agentx.data.formats.reading import kind
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

BASH = ToolSpec("bash", "run a shell command", (Parameter("command"),))
SQL = ToolSpec("sql", "run a query", (Parameter("query"),))


def tau_bench_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """One of a tau-bench results file. The tools are those that it called."""
    messages = openai_messages(list_of(record, "traj"))
    marked = _with_outcomes(messages, lambda m: m.content.startswith("Error"))
    return Conversation(tuple(marked), _tools_of_calls(messages), name, reward_of(record))


def swe_agent_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """A .traj file of SWE-agent, of its older text commands or of its tool calls.

    The history is what the model saw; it says neither which calls failed nor what it is worth.
    """
    history = list_of(record, "history")
    if any(isinstance(m, dict) and m.get("tool_calls") for m in history):
        messages = openai_messages([_with_call_id(m) for m in history])
        messages = tuple(_without_echo(m, f) for m, f in zip(messages, history, strict=True))
        return Conversation(messages, _tools_of_calls(messages), name)
    spoken: list[tuple[Message, list[str]]] = []
    is_result = False
    for number, fields in enumerate(history):
        where = f"history {number}"
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: this is no object but a {kind(fields)}")
        role, content = fields.get("role"), fields.get("content")
        is_listed = isinstance(content, list)
        content = content_of(content, where) if is_listed else _text(fields, "content", where)
        if role == "assistant" and fields.get("action"):
            call = ToolCall("bash", {"command": _text(fields, "action", where)})
            thought = _text(fields, "thought", where)
            spoken.append((Message("assistant", thought=thought, tool_calls=(call,)), [""]))
        elif role == "user" and is_result:
            spoken.append((Message("tool", content), [""]))
        elif role in ("system", "user", "assistant"):
            spoken.append((Message(role, content), []))
        else:
            raise ValueError(f"{where}: nobody speaks as {role!r}")
        is_result = bool(spoken[-1][0].tool_calls)
    return Conversation(matched(spoken), (BASH,), name)


def intercode_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """One episode of an InterCode results file, against bash or SQL."""
    turns = record.get("turn_history")
    if not isinstance(turns, dict) or not isinstance(record.get("query"), str):
        raise ValueError("there is no object 'turn_history' beside a string 'query'")
    columns = [
        list_of(turns, key, "turn_history")
        for key in ("actions", "observations", "rewards", "valid_action")
    ]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"turn_history has columns of {[len(c) for c in columns]} turns")
    tool = SQL if "sql" in str(record.get("environment")) else BASH
    messages = [Message("user", record["query"])]
    valid, best = [], None
    for number, (action, observation, reward, is_valid) in enumerate(zip(*columns, strict=True)):
        if not isinstance(action, str):
            raise ValueError(f"turn {number}: the action must be a string, not a {kind(action)}")
        text = observation if isinstance(observation, str) else json.dumps(observation)
        call = ToolCall(tool.name, {tool.parameters[0].name: action})
        messages += [Message("assistant", tool_calls=(call,)), Message("tool", text)]
        valid.append(is_valid is True)
        earned = reward_of({"reward": reward})
        best = earned if best is None or (earned is not None and earned > best) else best
    is_valid_in_order = iter(valid)
    marked = _with_outcomes(messages, lambda m: not next(is_valid_in_order))
    return Conversation(tuple(marked), (tool,), name, best)


def verifiers_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """A rollout that the verifiers package saved; a string stands for one message."""
    said: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        part = record.get(key)
        if not isinstance(part, str | list):
            raise ValueError(f"{key} must be a list of messages or a string, not a {kind(part)}")
        said += [{"role": role, "content": part}] if isinstance(part, str) else part
    messages = openai_messages(said)
    info = record.get("info")
    offered = (info.get("oai_tools") if isinstance(info, dict) else None) or record.get("tools")
    tools = openai_tools(offered) if offered else _tools_of_calls(messages)
    return Conversation(messages, tools, name, reward_of(record))


def _with_outcomes(
    messages: Iterable[Message], is_failure: Callable[[Message], bool]
) -> list[Message]:
    """Marks the results that are failures, the calls that made them, and the first call after.

    The messages of one episode in order: a call is FAILED where one of its results is, and
    RECOVERED where it is the first that is not after one that was.
    """
    marked: list[Message] = []
    call_at, after_failure = -1, False
    for message in messages:
        if message.tool_calls:
            outcome = Outcome.RECOVERED if after_failure else Outcome.OK
            call_at, after_failure = len(marked), False
            message = dataclasses.replace(message, outcome=outcome)
        elif message.role == "tool" and is_failure(message):
            message = dataclasses.replace(message, outcome=Outcome.FAILED)
            marked[call_at] = dataclasses.replace(marked[call_at], outcome=Outcome.FAILED)
            after_failure = True
        marked.append(message)
    return marked


def _tools_of_calls(messages: Iterable[Message]) -> tuple[ToolSpec, ...]:
    """The tools that the calls show, for conversations that do not say what was on offer.

    A tool's parameters are those that any call gave, the most frequent first; its description is
    empty. A parameter whose values are of several types may be anything.
    """
    given: dict[str, collections.Counter[str]] = {}
    types: dict[tuple[str, str], set[str]] = {}
    for call in (call for message in messages for call in message.tool_calls):
        counts = given.setdefault(call.name, collections.Counter())
        for key, value in call.arguments.items():
            counts[key] += 1
            types.setdefault((call.name, key), set()).add(type_of(value))

    def parameter(tool: str, key: str) -> Parameter:
        return Parameter(key, one_type(types[tool, key]))

    return tuple(
        ToolSpec(name, "", tuple(parameter(name, key) for key, _ in counts.most_common()))
        for name, counts in given.items()
    )


def _with_call_id(fields: Any) -> Any:
    """A tool message of SWE-agent names the calls that it answers in a list."""
    answered = fields.get("tool_call_ids") if isinstance(fields, dict) else None
    if isinstance(answered, list) and answered and fields.get("role") == "tool":
        return {**fields, "tool_call_id": answered[0]}
    return fields


def _without_echo(message: Message, fields: dict[str, Any]) -> Message:
    """What the model said beside a call is its thought, which SWE-agent writes twice."""
    if not message.tool_calls:
        return message
    thought = fields.get("thought")
    if not isinstance(thought, str) or not thought:
        thought = message.content
    return Message("assistant", thought=thought, tool_calls=message.tool_calls)


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    text = fields.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key} must be a string, not a {kind(text)}")
    return text
