"""Files to documents, and documents to trajectories.

Enters: text files, source trees, and JSONL of texts or of conversations in our own message format.
Leaves: documents one by one, in a fixed order, and the `Trajectory` of each. A record that cannot
be read is an error in one sentence that names the file and the place in it, or, where asked, is
skipped and counted by reason: `counts.read == counts.kept + counts.num_skipped`, always. Records
without any text are always skipped.

A line of JSONL of conversations is an object like this one, on one line (fields that are empty may
be left out; an outcome is "ok", "failed" or "recovered"):

    {"messages": [
        {"role": "user", "content": "Where is `walk`?"},
        {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {"name": "walk"}}]},
        {"role": "tool", "content": "os.py"},
        {"role": "assistant", "content": "os.py"}],
     "tools": [
        {"name": "find", "description": "find a function",
         "parameters": [{"name": "name", "type": "string"}]}]}
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np

from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import (
    Message,
    Outcome,
    Parameter,
    Role,
    Span,
    ToolCall,
    ToolSpec,
    Trajectory,
)

OnError = Literal["raise", "skip"]
PathLike = str | os.PathLike[str]
T = TypeVar("T")

# The reason under which records without text are counted.
_EMPTY = "empty"


@dataclasses.dataclass
class ReadCounts:
    """How many records a reader saw, how many it passed on, and why it left out the others."""

    read: int = 0
    kept: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A text and where it came from: a path, or a file and line."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and the tools that were on offer. `name` says where it came from."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    name: str = ""


def read_text_tree(
    root: PathLike,
    pattern: str = "*",
    *,
    on_error: OnError = "raise",
    counts: ReadCounts | None = None,
) -> Iterator[TextDocument]:
    """One document for each file below `root` (or for `root`, if it is a file), in order of path.

    pattern: of file names, "*.py" for instance. A document's name is its path from `root`.
    Raises ValueError for a file that is not UTF-8, naming it and the offset of the byte, and where
    there is nothing to read.
    """
    top = Path(root)
    if not top.exists():
        raise ValueError(f"there is no file or folder {top}")
    files = [top] if top.is_file() else sorted(p for p in top.rglob(pattern) if p.is_file())
    counts = ReadCounts() if counts is None else counts

    def parse(file: Path) -> TextDocument | None:
        text = _decode(file.read_bytes(), str(file))
        name = file.name if file == top else file.relative_to(top).as_posix()
        return TextDocument(name, text) if text.strip() else None

    yield from _read(files, parse, f"{top} ({pattern})", on_error, counts)


def read_text_jsonl(
    path: PathLike,
    field: str = "text",
    *,
    on_error: OnError = "raise",
    counts: ReadCounts | None = None,
) -> Iterator[TextDocument]:
    """One document for each line of a JSONL file, from the string under `field`.

    Raises ValueError for a line that is not such an object, naming file and line, and for a file
    without a document.
    """

    def parse(line: tuple[str, bytes]) -> TextDocument | None:
        place, data = line
        if not data.strip():
            return None
        record = _record(data, place)
        if not isinstance(record.get(field), str):
            raise _Malformed(f"{place}: there is no string {field!r}", f"no string {field!r}")
        return TextDocument(place, record[field]) if record[field].strip() else None

    counts = ReadCounts() if counts is None else counts
    yield from _read(_lines(path), parse, str(path), on_error, counts)


def read_conversations(
    path: PathLike, *, on_error: OnError = "raise", counts: ReadCounts | None = None
) -> Iterator[Conversation]:
    """One conversation for each line of a JSONL file, in the format at the top of this module.

    Raises ValueError for a line that is not one, naming file, line and field, and for a file
    without a conversation.
    """

    def parse(line: tuple[str, bytes]) -> Conversation | None:
        place, data = line
        if not data.strip():
            return None
        try:
            conversation = conversation_from_dict(_record(data, place), place)
        except _Malformed:
            raise
        except ValueError as error:
            raise _Malformed(f"{place}: {error}", "no conversation") from None
        return conversation if conversation.messages else None

    counts = ReadCounts() if counts is None else counts
    yield from _read(_lines(path), parse, str(path), on_error, counts)


def write_conversations(path: PathLike, conversations: Iterable[Conversation]) -> None:
    """Writes what `read_conversations` reads, in one step: a reader never sees half a file."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            record = conversation_to_dict(conversation)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """The JSON form, without the fields that are empty; an outcome is its name in lower case."""
    messages = []
    for message in conversation.messages:
        fields = {k: v for k, v in dataclasses.asdict(message).items() if v}
        if "outcome" in fields:
            fields["outcome"] = message.outcome.name.lower()
        messages.append(fields)
    return {
        "messages": messages,
        "tools": [dataclasses.asdict(tool) for tool in conversation.tools],
    }


def conversation_from_dict(record: dict[str, Any], name: str = "") -> Conversation:
    """Reads the JSON form. Raises ValueError that names the message or tool and the field."""
    messages = [
        _message(fields, f"message {i}") for i, fields in enumerate(_list(record, "messages"))
    ]
    tools = []
    for i, fields in enumerate(_list(record, "tools", required=False)):
        where = f"tool {i}"
        parameters = tuple(
            _build(Parameter, p, f"{where}, parameter {j}")
            for j, p in enumerate(_list(fields, "parameters", where, required=False))
        )
        tools.append(_build(ToolSpec, {**fields, "parameters": parameters}, where))
    return Conversation(tuple(messages), tuple(tools), name)


def text_trajectory(document: TextDocument, tokenizer: Tokenizer) -> Trajectory:
    """One span: <|bos|>, the text, <|end|>."""
    special = tokenizer.special
    ids = [special["<|bos|>"], *tokenizer.encode(document.text), special["<|end|>"]]
    return Trajectory([Span(Role.TEXT, np.array(ids, np.int32))], task_id=document.name)


def conversation_trajectory(conversation: Conversation, renderer: ToolRenderer) -> Trajectory:
    """The spans that the renderer makes. Those before the assistant first speaks are the prompt."""
    spans = renderer.render(conversation.messages, conversation.tools)
    spoken = (Role.THOUGHT, Role.CALL, Role.ARGUMENTS, Role.ANSWER)
    prompt = next((i for i, span in enumerate(spans) if span.role in spoken), len(spans))
    return Trajectory(spans, task_id=conversation.name, num_prompt_spans=prompt)


class _Malformed(ValueError):
    """A record that cannot be read. `reason` is what it is counted under."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


def _read(
    records: Iterable[Any],
    parse: Callable[[Any], T | None],
    where: str,
    on_error: OnError,
    counts: ReadCounts,
) -> Iterator[T]:
    """The one loop that counts. `parse` returns None for a record without text."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")
    kept_before = counts.kept
    for record in records:
        counts.read += 1
        try:
            document = parse(record)
        except _Malformed as error:
            counts.skipped[error.reason] += 1
            if on_error == "raise":
                raise
            continue
        if document is None:
            counts.skipped[_EMPTY] += 1
            continue
        counts.kept += 1
        yield document
    if counts.kept == kept_before:
        raise ValueError(f"{where} holds no document: the data set is empty")


def _lines(path: PathLike) -> Iterator[tuple[str, bytes]]:
    """Each line with its place, `file:line`."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line.rstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Malformed(
            f"{place} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "convert it, or skip such files",
            "not UTF-8",
        ) from None


def _record(data: bytes, place: str) -> dict[str, Any]:
    text = _decode(data, place)
    try:
        record = json.loads(text)
        if "\\u" in text:  # an escape can spell half of a character, which is no text
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _Malformed(
            f"{place}: this is no JSON: {error.msg} at column {error.colno}", "no JSON"
        ) from None
    except UnicodeEncodeError:
        raise _Malformed(f"{place}: a string has a lone surrogate", "lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"{place}: this JSON is beyond reading: {error}", "no JSON") from None
    if not isinstance(record, dict):
        raise _Malformed(f"{place}: this is no JSON object but a {_kind(record)}", "no object")
    return record


def _message(fields: Any, where: str) -> Message:
    calls = []
    for i, call in enumerate(_list(fields, "tool_calls", where, required=False)):
        calls.append(_build(ToolCall, call, f"{where}, tool call {i}"))
    outcome = fields.get("outcome", "ok")
    names = [o.name.lower() for o in Outcome]
    if outcome not in names:
        raise ValueError(f"{where}: outcome is {outcome!r}; it must be one of {', '.join(names)}")
    built = {**fields, "tool_calls": tuple(calls), "outcome": Outcome(names.index(outcome))}
    return _build(Message, built, where)


def _list(fields: Any, key: str, where: str = "", *, required: bool = True) -> Sequence[Any]:
    prefix = f"{where}: " if where else ""
    if not isinstance(fields, dict):
        raise ValueError(f"{prefix}this is no object but a {_kind(fields)}")
    value = fields.get(key, None if required else [])
    if not isinstance(value, list):
        raise ValueError(f"{prefix}there is no list {key!r}")
    return value


def _build(cls: type[T], fields: Any, where: str) -> T:
    """A dataclass from a JSON object: unknown and missing fields and wrong types are named."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: this is no object but a {_kind(fields)}")
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
            raise ValueError(f"{where}: {key} must be a string, not a {_kind(value)}")
        elif key == "arguments" and not isinstance(value, dict):
            raise ValueError(f"{where}: {key} must be an object, not a {_kind(value)}")
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


def _kind(value: Any) -> str:
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
