"""The formats of conversations by name: recognising them, reading files of them, writing our own.

Enters: a JSONL, JSON or Parquet file. Leaves: a `Conversation` for each record, and the
`Trajectory` of it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentx.data.formats.chat import (
    hermes_conversation,
    openai_conversation,
    sharegpt_conversation,
)
from agentx.data.formats.native import Conversation, agentx_conversation, conversation_to_dict
from agentx.data.formats.places import PathLike
from agentx.data.formats.reading import (
    Ids,
    Malformed,
    OnError,
    ReadCounts,
    json_object,
    read_records,
)
from agentx.data.formats.recorded import (
    intercode_conversation,
    swe_agent_conversation,
    tau_bench_conversation,
    verifiers_conversation,
)
from agentx.data.formats.records import records
from agentx.data.formats.texts import markers_of
from agentx.render import Renderer, ToolRenderer, as_tool_format
from agentx.trajectory import Message, Role, Trajectory

# The format of texts, which `sniff` may find beside those of conversations.
TEXT = "text"

# From how many records a format is recognised.
_SNIFFED = 16


class Format(NamedTuple):
    """parse: a record and its place to a conversation. suits: whether a record looks like it.

    identity: of those fields together no two records of a file have the same, unless one of the
    fields is missing. There are none where the format repeats its ids.
    """

    parse: Callable[[dict[str, Any], str], Conversation]
    suits: Callable[[dict[str, Any]], bool]
    identity: tuple[str, ...] = ("id",)


def _has_lists(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: all(isinstance(record.get(key), list) for key in keys)


def _is_openai(record: dict[str, Any]) -> bool:
    """Messages with something in them that our own format lacks."""
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list):
        return False
    foreign = {"tool_call_id", "function_call", "name", "reasoning_content", "refusal", "weight"}
    for message in (m for m in messages if isinstance(m, dict)):
        calls = message.get("tool_calls", [])
        if foreign & set(message) or isinstance(message.get("content"), list) or calls is None:
            return True
        role, content = message.get("role"), message.get("content", "")
        if role in ("developer", "function") or (role == "assistant" and content is None):
            return True
        if isinstance(calls, list) and any(isinstance(c, dict) and "function" in c for c in calls):
            return True
    listed = tools if isinstance(tools, list) else []
    return any(isinstance(tool, dict) and "function" in tool for tool in listed)


def _is_hermes(record: dict[str, Any]) -> bool:
    turns = record.get("conversations")
    listed = turns if isinstance(turns, list) else []
    texts = [str(turn.get("value")) for turn in listed if isinstance(turn, dict)]
    return any(tag in text for text in texts for tag in ("<tool_call>", "<tools>"))


# In the order in which they are tried: what is more particular comes first.
FORMATS = {
    "tau_bench": Format(tau_bench_conversation, _has_lists("traj"), ("task_id", "trial")),
    "swe_agent": Format(swe_agent_conversation, _has_lists("history")),
    "intercode": Format(intercode_conversation, lambda r: "turn_history" in r, ("task_id",)),
    # Each attempt at an example has the example's id.
    "verifiers": Format(verifiers_conversation, lambda r: "prompt" in r and "completion" in r, ()),
    "hermes": Format(hermes_conversation, _is_hermes),
    "sharegpt": Format(sharegpt_conversation, _has_lists("conversations")),
    "openai": Format(openai_conversation, _is_openai),
    "agentx": Format(agentx_conversation, _has_lists("messages")),
}


def sniff(path: PathLike) -> str:
    """The name of the format of a file, from its first records; "text" where they hold a `text`.

    Raises ValueError where it looks like none.
    """
    first = []
    for place, data in itertools.islice(records(path), _SNIFFED):
        try:
            first.append(json_object(data, place))
        except Malformed:  # reading it will say so
            continue
    for name, format in FORMATS.items():
        if any(format.suits(record) for record in first):
            return name
    if any(isinstance(record.get("text"), str) for record in first):
        return TEXT
    if not first:
        return "agentx"
    raise ValueError(
        f"{path}: its first records, with {', '.join(sorted(map(repr, first[0]))) or 'nothing'}, "
        f"look like none of {', '.join(FORMATS)}; name the field that holds the text, or the format"
    )


def read_as(
    format: str, path: PathLike, on_error: OnError, counts: ReadCounts
) -> Iterator[Conversation]:
    """One conversation for each record of a file of this format.

    Raises ValueError for a record that is not one, naming file, line and field, and for an id that
    comes twice.
    """
    chosen, ids = FORMATS[format], Ids()

    def parse(record: tuple[str, Any]) -> Conversation | None:
        place, data = record
        if isinstance(data, bytes) and not data.strip():
            return None
        fields = json_object(data, place)
        try:
            conversation = chosen.parse(fields, place)
        except ValueError as error:
            reason = error.reason if isinstance(error, Malformed) else "no conversation"
            raise Malformed(f"{place}: {error}", reason) from None
        given = [fields.get(key) for key in chosen.identity]
        if given and None not in given:
            ids.check(given[0] if len(given) == 1 else tuple(given), place)
        return conversation if conversation.messages else None

    yield from read_records(records(path), parse, on_error, counts)


def write_conversations(path: PathLike, conversations: Iterable[Conversation]) -> None:
    """Writes what `read_documents` reads, in one step: a reader never sees half a file."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            record = conversation_to_dict(conversation)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def conversation_trajectory(conversation: Conversation, renderer: Renderer) -> Trajectory:
    """The spans that the renderer makes. Those before the assistant first speaks are the prompt.

    The reward is NaN where nobody gave one. Raises ValueError for what the tool format cannot say.
    """
    messages: Sequence[Message] = conversation.messages
    if isinstance(renderer, ToolRenderer):
        messages = as_tool_format(messages)
    spans = renderer.render(messages, conversation.tools)
    spoken = (Role.THOUGHT, Role.CALL, Role.ARGUMENTS, Role.ANSWER)
    prompt = next((i for i, span in enumerate(spans) if span.role in spoken), len(spans))
    reward = math.nan if conversation.reward is None else conversation.reward
    return Trajectory(
        spans,
        reward,
        task_id=conversation.name,
        num_prompt_spans=prompt,
        markers=markers_of(renderer.tokenizer),
    )
