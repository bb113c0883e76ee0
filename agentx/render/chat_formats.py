"""What each chat format says, as text: `Part`s of the format itself and of the messages.

The formats are those of the published templates of Qwen 3, Llama 3.1 and 3.3, and Hermes 3; our own
templates, <name>.jinja beside this file, say the same. ChatML itself has no tools and no thoughts:
here it has Qwen's, with every turn's thought and with results as turns of a "tool".

- qwen3 leaves out the thoughts of all turns before the user's last message, and line breaks around
  those it keeps.
- llama3 states a date in the system turn, always the same, lists the tools in the first message of
  the user and writes results as JSON strings. It trims messages, and has one call a message.
- hermes describes the tools in a system turn of their own. Its results end one line break earlier
  at the end of a conversation than within it, as published.

What a format has no words for (a thought or a second call in Llama 3, content beside a call in
either, ...) is refused: the templates leave it out without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from agentx.trajectory import Message, Role, ToolCall, ToolSpec

Field = tuple[str, int, int]  # name, first byte, byte behind it


class Part(NamedTuple):
    """A piece of text. `said`: by a message, so that no marker is read from it."""

    text: str
    said: bool = False


class Opening(NamedTuple):
    """How a conversation begins; `in_user`, if any, is the whole of the user's first message."""

    system: list[Part]
    in_user: Sequence[Part] = ()


class Malformed(Exception):
    """A sampled turn that is neither calls nor an answer; the message says why."""


class ChatFormat(Protocol):
    """needs: markers that have to be tokens. tags: those in a turn, text where they are none.

    end: closes a turn. between: stands between a turn's end and the next header. bos: what a text
    begins with, the first of these that the tokenizer has.
    """

    needs: tuple[str, ...]
    tags: tuple[str, ...]
    end: str
    between: str
    bos: tuple[str, ...]

    def header(self, role: str) -> str: ...
    def opening(
        self, system: str | None, tools: Sequence[ToolSpec], messages: Sequence[Message]
    ) -> Opening: ...
    def message(self, message: Message, before: str, after: str) -> list[Part]: ...
    def turn(self, messages: Sequence[Message], number: int) -> list[Part]: ...
    def marks(self, data: bytes, fields: Sequence[Field]) -> list[tuple[int, Role]]: ...
    def read(self, texts: list[str], tags: list[str]) -> Message: ...


def tool_schemas(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """The tools as chat templates take them. Which parameters are required, nobody says."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": {
                    "type": "object",
                    "properties": {
                        p.name: {} if p.type == "any" else {"type": p.type} for p in tool.parameters
                    },
                },
            },
        }
        for tool in tools
    ]


class _ChatML:
    needs: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    tags: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    end = "<|im_end|>"
    between = "\n"
    bos: tuple[str, ...] = ()

    def header(self, role: str) -> str:
        return f"<|im_start|>{role}\n"

    def _whole(self, role: str, content: str) -> list[Part]:
        return [Part(self.header(role)), Part(content, said=True), Part(f"{self.end}\n")]

    def opening(
        self, system: str | None, tools: Sequence[ToolSpec], messages: Sequence[Message]
    ) -> Opening:
        if not tools:
            return Opening([] if system is None else self._whole("system", system))
        listed = [Part(f"\n{_json(schema)}", said=True) for schema in tool_schemas(tools)]
        head = [Part(self.header("system"))]
        if system is not None:
            head += [Part(system, said=True), Part("\n\n")]
        return Opening(
            [
                *head,
                Part(
                    "# Tools\n\nYou may call one or more functions to assist with the user query."
                    "\n\nYou are provided with function signatures within <tools></tools> XML tags:"
                    "\n<tools>"
                ),
                *listed,
                Part(
                    "\n</tools>\n\nFor each function call, return a json object with function name "
                    "and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
                    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
                    f"{self.end}\n"
                ),
            ]
        )

    def message(self, message: Message, before: str, after: str) -> list[Part]:
        return self._whole(message.role, message.content)

    def turn(self, messages: Sequence[Message], number: int) -> list[Part]:
        message = messages[number]
        thought = self._thought(message.thought) if message.thought else []
        return self._turn(message, [*thought, Part(message.content, said=True)])

    @staticmethod
    def _thought(thought: str) -> list[Part]:
        return [Part("<think>\n"), Part(thought, said=True), Part("\n</think>\n\n")]

    def _turn(self, message: Message, before_calls: list[Part]) -> list[Part]:
        parts = before_calls
        for number, call in enumerate(message.tool_calls):
            break_line = "\n" if number or message.content else ""
            parts += [
                Part(f'{break_line}<tool_call>\n{{"name": "'),
                Part(_plain_name(call.name), said=True),
                Part('", "arguments": '),
                Part(_json(call.arguments), said=True),
                Part("}\n</tool_call>"),
            ]
        return [*parts, Part(self.end)]

    def marks(self, data: bytes, fields: Sequence[Field]) -> list[tuple[int, Role]]:
        """Where roles begin, in bytes, each at its offset or later than the one before."""
        marks = []
        last = 0
        stops = [start for _, start, _ in fields[1:]] + [len(data)]
        for (name, start, stop), text_stop in zip(fields, stops, strict=True):
            text = data[stop:text_stop]
            if name == "<think>":
                marks.append((start, Role.THOUGHT))
            elif name == "</think>":
                breaks = len(text) - len(text.lstrip(b"\n"))
                marks.append((stop + min(breaks, 2), Role.ANSWER))
            elif name == "<tool_call>":
                has_break = data[start - 1 : start] == b"\n" and start > last
                marks.append((start - has_break, Role.CALL))
                found = re.search(rb'"arguments":', text)
                if found:
                    marks.append((stop + found.end(), Role.ARGUMENTS))
            last = marks[-1][0] if marks else 0
        return marks

    def read(self, texts: list[str], tags: list[str]) -> Message:
        """The message of the texts before, between and behind the tags."""
        thought = ""
        if tags[:2] == ["<think>", "</think>"] and not texts[0].strip():
            thought, texts, tags = self._read_thought(texts[1]), texts[2:], tags[2:]
            texts[0] = self._behind_thought(texts[0])
        if tags != ["<tool_call>", "</tool_call>"] * (len(tags) // 2):
            raise Malformed("its tags do not match")
        content = texts[0].removesuffix("\n") if tags else texts[0]
        if any(text.strip() for text in texts[2::2]):
            raise Malformed("it has text behind a call")
        calls = tuple(_read_call(body, "arguments") for body in texts[1::2])
        return Message("assistant", content, thought, calls)

    @staticmethod
    def _read_thought(text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")

    @staticmethod
    def _behind_thought(text: str) -> str:
        return text.removeprefix("\n\n")


class _Qwen3(_ChatML):
    tags: tuple[str, ...] = (*_ChatML.tags, "<tool_response>", "</tool_response>")
    needs: tuple[str, ...] = (*_ChatML.needs, *tags)

    def message(self, message: Message, before: str, after: str) -> list[Part]:
        if message.role != "tool":
            return super().message(message, before, after)
        head = "" if before == "tool" else "<|im_start|>user"
        tail = "" if after == "tool" else f"{self.end}\n"
        return [
            Part(f"{head}\n<tool_response>\n"),
            Part(message.content, said=True),
            Part(f"\n</tool_response>{tail}"),
        ]

    def turn(self, messages: Sequence[Message], number: int) -> list[Part]:
        message = messages[number]
        queries = [i for i, m in enumerate(messages) if m.role == "user" and not _is_result(m)]
        last_query = queries[-1] if queries else len(messages) - 1
        is_last = number == len(messages) - 1
        if number <= last_query or not (is_last or message.thought):
            return self._turn(message, [Part(message.content, said=True)])
        thought = self._thought(message.thought.strip("\n"))
        return self._turn(message, [*thought, Part(message.content.lstrip("\n"), said=True)])

    @staticmethod
    def _read_thought(text: str) -> str:
        return text.strip("\n")

    @staticmethod
    def _behind_thought(text: str) -> str:
        return text.lstrip("\n")


def _is_result(message: Message) -> bool:
    text = message.content
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


class _Hermes(_ChatML):
    tags: tuple[str, ...] = (
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
    )
    bos: tuple[str, ...] = ("<|begin_of_text|>", "<s>")

    def opening(
        self, system: str | None, tools: Sequence[ToolSpec], messages: Sequence[Message]
    ) -> Opening:
        own = [] if system is None else self._whole("system", system)
        if not tools:
            return Opening(own)
        told = "\n".join(self._tool(schema["function"]) for schema in tool_schemas(tools))
        return Opening(
            [
                Part(
                    f"{self.header('system')}You are a function calling AI model. You are provided "
                    "with function signatures within <tools></tools> XML tags. You may call one or "
                    "more functions to assist with the user query. Don't make assumptions about "
                    "what values to plug into functions. Here are the available tools: <tools> "
                ),
                Part(told, said=True),
                Part(
                    " </tools>Use the following pydantic model json schema for each tool call you "
                    'will make: {"properties": {"name": {"title": "Name", "type": "string"}, '
                    '"arguments": {"title": "Arguments", "type": "object"}}, "required": ["name", '
                    '"arguments"], "title": "FunctionCall", "type": "object"}}\nFor each function '
                    "call return a json object with function name and arguments within <tool_call>"
                    "</tool_call> XML tags as follows:\n<tool_call>\n"
                    '{"name": <function-name>, "arguments": <args-dict>}\n</tool_call>'
                    f"{self.end}\n"
                ),
                *own,
            ]
        )

    @staticmethod
    def _tool(function: dict[str, Any]) -> str:
        """As published: a signature in the description, and one brace less than JSON needs."""
        given = function["parameters"]["properties"]
        types = [(name, _PYTHON_TYPES[spec.get("type", "any")]) for name, spec in given.items()]
        signature = ", ".join(f"{name}: {kind}" for name, kind in types)
        arguments = "".join(f"        {name}({kind}): " for name, kind in types)
        return (
            f'{{"type": "function", "function": {{"name": "{function["name"]}", "description": '
            f'"{function["name"]}({signature}) - {function["description"]}\n\n'
            f"{'    Args:' if types else ''}{_LINE if types else ''}{arguments}"
            f'", "parameters": {_json(function["parameters"]) if types else "{}"}}}'
        )

    def message(self, message: Message, before: str, after: str) -> list[Part]:
        if message.role != "tool":
            return super().message(message, before, after)
        head = "" if before in ("tool", "") else self.header("tool")
        line = "\n" if after else ""
        tail = "" if after == "tool" else self.end
        return [
            Part(f"{head}<tool_response>\n"),
            Part(message.content, said=True),
            Part(f"\n</tool_response>{line}{tail}"),
        ]

    def turn(self, messages: Sequence[Message], number: int) -> list[Part]:
        _refuse_unsayable(messages[number], "hermes")
        return super().turn(messages, number)


_LINE = "\n"
_PYTHON_TYPES = {
    "string": "str",
    "number": "float",
    "integer": "int",
    "boolean": "bool",
    "object": "dict",
    "array": "list[Union[]]",
    "any": "Any",
}


class _Llama3:
    needs: tuple[str, ...] = (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    tags: tuple[str, ...] = ()
    end = "<|eot_id|>"
    between = ""
    bos: tuple[str, ...] = ("<|begin_of_text|>",)

    def header(self, role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def opening(
        self, system: str | None, tools: Sequence[ToolSpec], messages: Sequence[Message]
    ) -> Opening:
        environment = "Environment: ipython\n" if tools else ""
        parts = [
            Part(
                f"{self.header('system')}{environment}Cutting Knowledge Date: December 2023\n"
                "Today Date: 26 Jul 2024\n\n"
            ),
            Part((system or "").strip(), said=True),
            Part(self.end),
        ]
        if not tools:
            return Opening(parts)
        if not messages or messages[0].role != "user":
            raise ValueError(
                "the llama3 format lists the tools in the user's first message, and this "
                "conversation does not begin with one"
            )
        parts.append(
            Part(
                f"{self.header('user')}Given the following functions, please respond with a JSON "
                "for a function call with its proper arguments that best answers the given prompt."
                '\n\nRespond in the format {"name": function name, "parameters": dictionary of '
                "argument name and its value}.Do not use variables.\n\n"
            )
        )
        for schema in tool_schemas(tools):
            listed = json.dumps(schema, ensure_ascii=False, indent=4)
            parts += [Part(listed, said=True), Part("\n\n")]
        return Opening(parts, [Part(messages[0].content.strip(), said=True), Part(self.end)])

    def message(self, message: Message, before: str, after: str) -> list[Part]:
        if message.role == "tool":
            return [
                Part(self.header("ipython")),
                Part(_json(message.content), said=True),
                Part(self.end),
            ]
        content = Part(message.content.strip(), said=True)
        return [Part(self.header(message.role)), content, Part(self.end)]

    def turn(self, messages: Sequence[Message], number: int) -> list[Part]:
        message = messages[number]
        _refuse_unsayable(message, "llama3")
        if not message.tool_calls:
            content = message.content.strip()
            if _LOOKS_LIKE_CALL.match(content):
                raise ValueError(
                    f"the llama3 format cannot say an answer that looks like a call: {content!r}"
                )
            return [Part(content, said=True), Part(self.end)]
        if len(message.tool_calls) > 1:
            names = ", ".join(call.name for call in message.tool_calls)
            raise ValueError(f"the llama3 format has one call a message, this one has {names}")
        call = message.tool_calls[0]
        return [
            Part('{"name": "'),
            Part(_plain_name(call.name), said=True),
            Part('", "parameters": '),
            Part(_json(call.arguments), said=True),
            Part("}"),
            Part(self.end),
        ]

    def marks(self, data: bytes, fields: Sequence[Field]) -> list[tuple[int, Role]]:
        if not _LOOKS_LIKE_CALL.match(data.decode(errors="replace")):
            return []
        found = re.search(rb'"parameters":', data)
        return [(0, Role.CALL), *([(found.end(), Role.ARGUMENTS)] if found else [])]

    def read(self, texts: list[str], tags: list[str]) -> Message:
        content = texts[0].strip()
        if not _LOOKS_LIKE_CALL.match(content):
            return Message("assistant", content)
        return Message("assistant", tool_calls=(_read_call(content, "parameters"),))


_LOOKS_LIKE_CALL = re.compile(r'\s*\{\s*"name"')


def _refuse_unsayable(message: Message, format: str) -> None:
    if message.thought:
        raise ValueError(
            f"the {format} format has no thoughts, and a message has one: leave it out"
        )
    if message.tool_calls and message.content:
        raise ValueError(
            f"the {format} format has no text beside a call, and a message that calls "
            f"{message.tool_calls[0].name} has the content {message.content!r}"
        )


def _plain_name(name: str) -> str:
    """A tool's name, which the formats write between quotes as it is."""
    if _json(name) != f'"{name}"':
        raise ValueError(f"the name of a tool cannot be {name!r}: it would have to be escaped")
    return name


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read_call(text: str, key: str) -> ToolCall:
    try:
        call = json.loads(text)
        _json(call).encode()
    except (ValueError, RecursionError) as error:  # no JSON or UTF-8, deeper or longer than read
        raise Malformed("its call is no JSON") from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Malformed("its call is no object with a name")
    if not isinstance(call.get(key), dict):
        raise Malformed(f"its call has no object of {key}")
    return ToolCall(call["name"], call[key])


FORMATS: dict[str, ChatFormat] = {
    "chatml": _ChatML(),
    "llama3": _Llama3(),
    "qwen3": _Qwen3(),
    "hermes": _Hermes(),
}
