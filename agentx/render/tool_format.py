"""Our own tool format.

In: `Message`s, the tools on offer, and a tokenizer. Out: `Span`s whose ids, put together, are what
the model sees. The way back, `parse`, reads the ids of one sampled turn as a message. Sampled ids
are never encoded again: `sampled_spans` only cuts them at their markers.

The tool format, one marker token a field:

    <|bos|><|system|>search(name): find a function<|user|>Where is `walk`?
    <|call|>search<|arguments|>walk<|end|><|observation|>os.py\\n64<|end|><|answer|>os.py<|end|>

Arguments are positional, in the order of the tool's parameters, which the tool list shows: strings
raw, everything else as JSON. An argument that the tool does not know comes last and keeps no name.
Where all arguments are empty strings, one <|sep|> more tells them from no arguments at all. Every
field is encoded apart from its neighbours. A call is made when <|end|> closes it; until then a
<|back|> takes it back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentx.tokenizer import Tokenizer
from agentx.trajectory import (
    Message,
    Origin,
    Outcome,
    Parameter,
    Role,
    Span,
    ToolCall,
    ToolSpec,
)

_TOOL_LINE = re.compile(r"([^\s()]+)\(([^()]*)\): (.*)")


def tool_list(tools: Sequence[ToolSpec]) -> str:
    """The tools as the model reads them, a line each: `open(path, line): show a line`.

    A line break in a description becomes a space.
    """
    return "\n".join(
        f"{t.name}({', '.join(p.name for p in t.parameters)}): " + t.description.replace("\n", " ")
        for t in tools
    )


def parse_tool_list(text: str) -> tuple[list[ToolSpec], str]:
    """The tools that a system text lists first, and what it says after them.

    The list has no types: all parameters count as strings.
    """
    lines = text.split("\n")
    tools = []
    for match in itertools.takewhile(bool, map(_TOOL_LINE.fullmatch, lines)):
        name, parameters, description = match.groups()  # type: ignore[union-attr]
        given = tuple(Parameter(p) for p in parameters.split(", ")) if parameters else ()
        tools.append(ToolSpec(name, description, given))
    return tools, "\n".join(lines[len(tools) :])


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parse_value(text: str, json_type: str) -> Any:
    """A value by its declared type; text that is no JSON stays text, for the tool to refuse."""
    if json_type == "string":
        return text
    try:
        value = json.loads(text)
        _value_text(value).encode()  # an escape may spell half a character, which no file holds
        return value
    except (ValueError, RecursionError):  # no JSON or UTF-8, deeper or longer than Python reads
        return text


def as_tool_format(messages: Sequence[Message]) -> list[Message]:
    """Messages as the tool format can say them: one call a message, and no text beside a call.

    Calls made together are made one after the other, each with its result behind it; text beside a
    call becomes the end of the thought before it. The results of a message's calls must follow it
    in the order of the calls; those of the last may be missing.
    """
    told: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if not message.tool_calls:
            told.append(message)
            continue
        results = list(itertools.takewhile(lambda m: m.role == "tool", messages[at:]))
        at += len(results)
        is_told = any(result.outcome is Outcome.FAILED for result in results)
        thought = "\n".join(text for text in (message.thought, message.content) if text)
        for number, call in enumerate(message.tool_calls):
            own = results[number : number + 1]
            outcome = message.outcome
            if own and outcome is Outcome.FAILED and is_told:
                outcome = own[0].outcome  # another of the calls is what failed
            told.append(
                dataclasses.replace(
                    message, content="", thought=thought, tool_calls=(call,), outcome=outcome
                )
            )
            told += own
            thought = ""
        told += results[len(message.tool_calls) :]
    return told


class ToolRenderer:
    """Renders and parses the tool format with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        special = tokenizer.special
        self._bos = special["<|bos|>"]
        self._end = special["<|end|>"]
        self._sep = special["<|sep|>"]
        self._back = special["<|back|>"]
        self._marker_of = {
            Role.SYSTEM: special["<|system|>"],
            Role.USER: special["<|user|>"],
            Role.THOUGHT: special["<|thought|>"],
            Role.CALL: special["<|call|>"],
            Role.ARGUMENTS: special["<|arguments|>"],
            Role.OBSERVATION: special["<|observation|>"],
            Role.ANSWER: special["<|answer|>"],
        }
        self._role_of = {marker: role for role, marker in self._marker_of.items()}
        self._specials = frozenset(special.values())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sampled turn; the one that ended it is part of the turn."""
        return (self._end,)

    def _span(
        self, role: Role, body: list[int], origin: Origin, outcome: Outcome, *, first: bool = False
    ) -> Span:
        ids = ([self._bos] if first else []) + [self._marker_of[role], *body]
        return Span(role, np.asarray(ids, np.int32), origin, outcome)

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Span]:
        """A whole conversation, from <|bos|> on. Tools are listed in its system span."""
        if not messages:
            raise ValueError("there is no message to render")
        system = [m.content for m in messages if m.role == "system"]
        if len(system) > 1 or (system and messages[0].role != "system"):
            raise ValueError("a conversation has at most one system message, and it comes first")
        text = "\n".join(part for part in [tool_list(tools), *system] if part)
        spans = [
            self._span(
                Role.SYSTEM, self.tokenizer.encode(text), Origin.DATA, Outcome.OK, first=True
            )
        ]
        by_name = {t.name: t for t in tools}
        for message in messages[1:] if system else messages:
            spans.extend(self._render_one(message, by_name, Origin.DATA))
        return spans

    def render_observations(self, messages: Sequence[Message]) -> list[Span]:
        """What an environment answered, to be appended to a running trajectory."""
        spans: list[Span] = []
        for message in messages:
            if message.role not in ("tool", "user"):
                raise ValueError(f"an environment cannot speak as {message.role!r}")
            spans.extend(self._render_one(message, {}, Origin.ENVIRONMENT))
        return spans

    def _render_one(
        self, message: Message, tools: dict[str, ToolSpec], origin: Origin
    ) -> list[Span]:
        encode, outcome = self.tokenizer.encode, message.outcome
        if message.role == "user":
            return [self._span(Role.USER, encode(message.content), origin, outcome)]
        if message.role == "tool":
            body = [*encode(message.content), self._end]
            return [self._span(Role.OBSERVATION, body, origin, outcome)]
        if message.role != "assistant":
            raise ValueError(f"a {message.role!r} message cannot stand in the middle")
        if message.malformed:
            raise ValueError(f"a malformed message cannot be rendered: {message.malformed}")
        spans = []
        if message.thought:
            spans.append(self._span(Role.THOUGHT, encode(message.thought), origin, outcome))
        if not message.tool_calls:
            body = [*encode(message.content), self._end]
            return [*spans, self._span(Role.ANSWER, body, origin, outcome)]
        if len(message.tool_calls) > 1:
            names = ", ".join(c.name for c in message.tool_calls)
            raise ValueError(f"the tool format has one call a message, this one has {names}")
        if message.content:
            raise ValueError(
                f"a message that calls {message.tool_calls[0].name} has the content "
                f"{message.content!r} too: put that into its thought"
            )
        call = message.tool_calls[0]
        texts = [_value_text(value) for value in self._ordered(call, tools)]
        body = [self._sep] if texts and not any(texts) else []
        for number, text in enumerate(texts):
            body += ([self._sep] if number else []) + encode(text)
        return [
            *spans,
            self._span(Role.CALL, encode(call.name), origin, outcome),
            self._span(Role.ARGUMENTS, [*body, self._end], origin, outcome),
        ]

    @staticmethod
    def _ordered(call: ToolCall, tools: dict[str, ToolSpec]) -> list[Any]:
        known = [p.name for p in tools[call.name].parameters] if call.name in tools else []
        given = [name for name in known if name in call.arguments]
        if given != known[: len(given)]:
            missing = next(name for name in known if name not in call.arguments)
            raise ValueError(
                f"call of {call.name} leaves out {missing!r} but gives a later argument; "
                "positional arguments can only be left out at the end"
            )
        extra = [name for name in call.arguments if name not in known]
        return [call.arguments[name] for name in given + extra]

    def sampled_spans(
        self,
        ids: Sequence[int] | np.ndarray,
        logprobs: Sequence[float] | np.ndarray,
        weight_version: int,
        outcome: Outcome,
    ) -> list[Span]:
        """Cuts one sampled turn at its markers; ids before the first marker are an answer span."""
        if not len(ids):
            return []
        ids_array = np.asarray(ids, np.int32)
        logprob_array = np.asarray(logprobs, np.float32)
        cuts = [i for i, token in enumerate(ids_array.tolist()) if token in self._role_of]
        starts = sorted({0, *cuts})
        spans = []
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            role = self._role_of.get(int(ids_array[start]), Role.ANSWER)
            spans.append(
                Span(
                    role,
                    ids_array[start:stop],
                    Origin.SAMPLED,
                    outcome,
                    logprob_array[start:stop],
                    weight_version,
                )
            )
        return spans

    def parse(self, ids: Sequence[int] | np.ndarray, tools: Sequence[ToolSpec]) -> Message:
        """Reads the ids of one assistant turn. What cannot be read comes back as `malformed`.

        A call that the turn takes back by <|back|> is not one: what follows the last <|back|> is
        read, with the thought that the turn began with.
        """
        ids = self._without_taken_back([int(i) for i in ids])
        if not ids or ids[-1] != self._end:
            return self._malformed("it does not end")
        if max(ids) >= self.tokenizer.vocab_size:
            return self._malformed("it holds an id outside the vocabulary")
        fields: list[tuple[Role, list[int]]] = []
        for token in ids[:-1]:
            role = self._role_of.get(token)
            if role is not None:
                fields.append((role, []))
            elif not fields:
                return self._malformed("it does not begin with a marker")
            else:
                fields[-1][1].append(token)
        if not fields:
            return self._malformed("it is empty")
        thought = ""
        if fields[0][0] is Role.THOUGHT and not self._specials.intersection(fields[0][1]):
            thought = self.tokenizer.decode(fields.pop(0)[1])
        roles = [role for role, _ in fields]
        if roles == [Role.ANSWER] and not self._specials.intersection(fields[0][1]):
            return Message("assistant", self.tokenizer.decode(fields[0][1]), thought)
        if roles != [Role.CALL, Role.ARGUMENTS] or self._specials.intersection(fields[0][1]):
            return self._malformed("it is neither a call nor an answer")
        values: list[list[int]] = [[]]
        for token in fields[1][1]:
            if token == self._sep:
                values.append([])
            elif token in self._specials:
                return self._malformed("its arguments hold a marker")
            else:
                values[-1].append(token)
        if not any(values):  # nothing but empty strings: one <|sep|> more than there are of them
            del values[-1]
        texts = [self.tokenizer.decode(v) for v in values]
        name = self.tokenizer.decode(fields[0][1])
        parameters = next((t.parameters for t in tools if t.name == name), ())
        arguments: dict[str, Any] = {}
        for number, text in enumerate(texts):
            if number < len(parameters):
                parameter = parameters[number]
                arguments[parameter.name] = _parse_value(text, parameter.type)
            else:
                arguments[str(number)] = text
        return Message("assistant", thought=thought, tool_calls=(ToolCall(name, arguments),))

    def _without_taken_back(self, ids: list[int]) -> list[int]:
        if self._back not in ids:
            return ids
        rest = ids[len(ids) - ids[::-1].index(self._back) :]
        if rest[:1] == [self._marker_of[Role.THOUGHT]]:
            return rest
        stop = next((i for i, x in enumerate(ids[1:], 1) if x in self._specials), len(ids))
        return [*(ids[:stop] if self._role_of.get(ids[0]) is Role.THOUGHT else []), *rest]

    @staticmethod
    def _malformed(reason: str) -> Message:
        return Message("assistant", malformed=reason, outcome=Outcome.FAILED)
