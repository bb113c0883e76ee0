"""Conversations as chat APIs and chat data sets write them.

Each function takes one JSON object and gives a `Conversation`, or raises ValueError in a sentence
that names the message and the field. Calls and their results are matched: results are put into the
order of their calls, a result without a call is refused, and so is a call that the conversation
passes over without a result.

    openai    {"messages": [{"role", "content", "tool_calls": [{"id", "function": {"name",
              "arguments": "JSON"}}], "tool_call_id"}], "tools": [{"function": {...}}]}
    sharegpt  {"conversations": [{"from": "human" | "gpt" | ..., "value": "text"}], "system"}
    hermes    the same, with <tools>, <tool_call> and <tool_response> around JSON in the values
"""

from __future__ import annotations

import ast
import collections
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from agentx.data.formats.native import Conversation, list_of, reward_of
from agentx.data.formats.reading import check_text, kind
from agentx.trajectory import Message, Parameter, ToolCall, ToolSpec

SpeakerRole = Literal["system", "user", "assistant", "tool"]

_OPENAI_ROLES: dict[str, SpeakerRole] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES: dict[str, SpeakerRole] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# The tag that is read in the turns of each role; any other there is text. A prompt may speak of its
# tag, with an empty pair, before it uses it.
_TAGGED = {
    "system": re.compile(r"<tools>(?!\s*</tools>)(.*?)</tools>", re.DOTALL),
    "assistant": re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL),
    "tool": re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL),
}
_JSON_TYPES = ("string", "integer", "number", "boolean", "object", "array")
_TYPE_OF = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
}


def openai_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """The messages of the chat completions API, with the legacy `function_call` too."""
    messages = openai_messages(list_of(record, "messages"))
    tools = openai_tools(record.get("tools") or record.get("functions") or [])
    return Conversation(messages, tools, name, reward_of(record))


def openai_messages(listed: Sequence[Any]) -> tuple[Message, ...]:
    """Messages of the chat completions API. Raises ValueError naming the message."""
    spoken: list[tuple[Message, list[str]]] = []
    for number, fields in enumerate(listed):
        where = f"message {number}"
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: this is no object but a {kind(fields)}")
        role = _role(fields.get("role"), _OPENAI_ROLES, where)
        content = content_of(fields.get("content") or fields.get("refusal"), where)
        if role == "assistant" and fields.get("weight") not in (None, 1):
            raise ValueError(
                f"{where}: its weight is {fields['weight']!r}, and a conversation has no weights: "
                "leave the field out to train the message, or skip the record"
            )
        if role == "tool":
            spoken.append((Message("tool", content), [str(fields.get("tool_call_id") or "")]))
            continue
        listed_calls = fields.get("tool_calls") or []
        if fields.get("function_call"):
            listed_calls = [{"function": fields["function_call"]}]
        if not isinstance(listed_calls, list):
            raise ValueError(f"{where}: tool_calls must be a list, not a {kind(listed_calls)}")
        if listed_calls and role != "assistant":
            raise ValueError(f"{where}: a {role} message cannot call tools")
        calls, ids = [], []
        for at, call in enumerate(listed_calls):
            calls.append(_openai_call(call, f"{where}, tool call {at}"))
            ids.append(str(call.get("id") or ""))
        thought = content_of(fields.get("reasoning_content") or fields.get("reasoning"), where)
        spoken.append((Message(role, content, thought, tuple(calls)), ids))
    return matched(spoken)


def openai_tools(listed: Any) -> tuple[ToolSpec, ...]:
    """Tools by JSON schema; a list, or the same as a string of JSON."""
    if isinstance(listed, str):
        listed = _json(listed, "tools")
    if not isinstance(listed, list):
        raise ValueError(f"tools must be a list, not a {kind(listed)}")
    tools = []
    for number, tool in enumerate(listed):
        where = f"tool {number}"
        if isinstance(tool, str):
            tool = _json(tool, where)
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: there is no string 'name'")
        schema = function.get("parameters") or function.get("input_schema") or {}
        properties = schema.get("properties", {}) if isinstance(schema, dict) else schema
        if not isinstance(properties, dict):
            raise ValueError(f"{where}: its parameters are no JSON schema of an object")
        description = function.get("description") or ""
        if not isinstance(description, str):
            raise ValueError(f"{where}: description must be a string, not a {kind(description)}")
        parameters = tuple(Parameter(key, _schema_type(p)) for key, p in properties.items())
        tools.append(ToolSpec(function["name"], description, parameters))
    return tuple(tools)


def sharegpt_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """Turns as {"from", "value"}; a function_call's value is JSON with name and arguments."""
    return _sharegpt(record, name, lambda role, value: (value, []))


def hermes_conversation(record: dict[str, Any], name: str = "") -> Conversation:
    """ShareGPT with tags: tools in the system turn, calls and results in their turns.

    A tag in the turn of another role is text. JSON between tags may be written as Python's
    literals, as some of that data is.
    """
    return _sharegpt(record, name, _untagged)


def _sharegpt(
    record: dict[str, Any],
    name: str,
    read: Callable[[SpeakerRole, str], tuple[str, list[Any]]],
) -> Conversation:
    """`read` cuts a value into its text and the tools, calls or results that are tagged in it."""
    spoken: list[tuple[Message, list[str]]] = []
    tools = list(openai_tools(record.get("tools") or []))
    system = record.get("system")
    if system:
        spoken.append((Message("system", content_of(system, "system")), []))
    for number, turn in enumerate(list_of(record, "conversations")):
        where = f"turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: this is no object but a {kind(turn)}")
        role = _role(turn.get("from"), _SHAREGPT_ROLES, where)
        value = turn.get("value")
        if not isinstance(value, str):
            raise ValueError(f"{where}: value must be a string, not a {kind(value)}")
        if turn["from"] == "function_call":
            call = _call(_json(value, where), where)
            spoken.append((Message("assistant", tool_calls=(call,)), [""]))
            continue
        try:
            text, tagged = read(role, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if role == "system" and not record.get("tools"):
            tools.extend(openai_tools(tagged))
        if role == "assistant":
            calls = tuple(_call(call, where) for call in tagged)
            spoken.append((Message(role, text, tool_calls=calls), [""] * len(calls)))
        elif role == "tool" and tagged:
            results = [x if isinstance(x, str) else json.dumps(x) for x in tagged]
            spoken.extend((Message("tool", result), [""]) for result in results)
        else:
            spoken.append((Message(role, text), [""] if role == "tool" else []))
    return Conversation(matched(spoken), tuple(tools), name, reward_of(record))


def _untagged(role: SpeakerRole, value: str) -> tuple[str, list[Any]]:
    tag = _TAGGED.get(role)
    bodies = [body.strip() for body in tag.findall(value)] if tag else []
    if not tag or not bodies:
        return value, []
    found: list[Any] = []
    for body in bodies:
        if role == "system":
            found += _json_or_literal(body if body[0] == "[" else f"[{body}]", "its <tools>")
        else:
            is_call = role == "assistant"
            found.append(_json_or_literal(body, "its <tool_call>") if is_call else body)
    return tag.sub("", value).strip(), found


def matched(spoken: Iterable[tuple[Message, Sequence[str]]]) -> tuple[Message, ...]:
    """Messages whose results stand in the order of their calls.

    Enters each message with its ids: those of its calls, or the one that a result answers; "" where
    there is none, which answers the calls in their order. Raises ValueError as the module says.
    """
    messages: list[Message] = []
    open_ids: list[str] = []
    results: dict[int, Message] = {}

    def close(where: str) -> None:
        missing = next((i for i in range(len(open_ids)) if i not in results), None)
        # A conversation may break off before the results of its last calls, but not skip one.
        if missing is not None and (where or missing < len(results)):
            call = messages[-1].tool_calls[missing]
            where = where or f"message {len(messages) + len(results)}, the end"
            raise ValueError(f"{where}: the call of {call.name!r} before it has no result")
        messages.extend(results[i] for i in sorted(results))
        open_ids.clear()
        results.clear()

    for number, (message, ids) in enumerate(spoken):
        where = f"message {number}"
        if message.role != "tool":
            close(where)
            messages.append(message)
            open_ids.extend(ids if message.tool_calls else [])
            repeated = [i for i, n in collections.Counter(filter(None, open_ids)).items() if n > 1]
            if repeated:
                raise ValueError(f"{where}: two calls have the id {repeated[0]!r}")
            continue
        (answers,) = ids
        waiting = [i for i in range(len(open_ids)) if i not in results]
        fits = [i for i in waiting if not answers or open_ids[i] in ("", answers)]
        if not fits:
            of = f" {answers!r}" if answers else ""
            raise ValueError(f"{where}: this result answers no call{of} that waits for one")
        results[fits[0]] = message
    close("")
    return tuple(messages)


def _role(given: Any, roles: dict[str, SpeakerRole], where: str) -> SpeakerRole:
    if not isinstance(given, str) or given not in roles:
        raise ValueError(f"{where}: nobody speaks as {given!r}; there are {', '.join(roles)}")
    return roles[given]


def content_of(content: Any, where: str) -> str:
    """A string, nothing, or a list of parts that are all text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text, not a {kind(content)}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where}: a part of its content is no text but {what!r}")
        texts.append(part["text"])
    return "".join(texts)


def _openai_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"{where}: there is no object 'function'")
    return _call(function, where)


def _call(fields: Any, where: str) -> ToolCall:
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
        raise ValueError(f"{where}: there is no string 'name'")
    arguments = fields.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: the text of the arguments of {fields['name']!r}")
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}: the arguments of {fields['name']!r} are no object but a {kind(arguments)}"
        )
    return ToolCall(fields["name"], arguments)


def _json(text: str, what: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    check_text(value, what)
    return value


def _json_or_literal(text: str, what: str) -> Any:
    """JSON, or the same as Python writes it; nothing is evaluated."""
    try:
        return _json(text, what)
    except ValueError as error:
        try:
            value = ast.literal_eval(text)
            return _json(json.dumps(value, allow_nan=False), what)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise error from None


def _schema_type(schema: Any) -> Any:
    """The type of a parameter, "any" where its schema allows several or does not say."""
    if not isinstance(schema, dict):
        return "any"
    options = schema.get("anyOf") or schema.get("oneOf")
    if schema.get("type") is not None or not isinstance(options, list):
        options = [schema]
    found: list[Any] = []
    for option in options:
        option = option if isinstance(option, dict) else {}
        told, values = option.get("type"), option.get("enum")
        if told is not None:
            found += told if isinstance(told, list) else [told]
        elif isinstance(values, list):
            found += map(type_of, values)
        else:
            found.append("any")
    return one_type(found)


def type_of(value: Any) -> str:
    return _TYPE_OF.get(type(value), "null")


def one_type(names: Iterable[Any]) -> Any:
    """The type that takes all of these in; null, which stands for what is left out, counts not."""
    found = {name if name in _JSON_TYPES else "any" for name in names if name != "null"}
    if found == {"integer", "number"}:
        return "number"
    return found.pop() if len(found) == 1 else "any"
