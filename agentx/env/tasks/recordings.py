"""What the quickstart trains on, recorded on this machine: text, sessions, demonstrations.

Four JSONL files, each a document a line, in the formats that agentx.data reads:

    text.jsonl            {"text": ...}                         source of the library's train split
    sessions.jsonl        {"tools": [...], "messages": [...]}   instructed sessions, made-up files
    repetitions.jsonl     {"tools": [], "messages": [...]}      made-up names, to be repeated
    demonstrations.jsonl  {"tools": [...], "messages": [...]}   library questions, train split

Nothing here reads a file of the dev or held-out splits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agentx.env.tasks.corpus import name_fragments, standard_library
from agentx.env.tasks.expert import Demonstration, demonstrate, instructed_session, repetition
from agentx.env.tasks.library import LibraryTasks
from agentx.trajectory import Message, Outcome


@dataclasses.dataclass(frozen=True)
class RecordingConfig:
    """How much to record.

    num_sessions of num_rounds instructions each, a share of them with renamed tools;
    num_repetitions of lists of made-up names; num_demonstrations of library questions;
    text_characters of source code, cut into chunks of text_chunk characters at line ends. rate_cold
    and slip_rate: how often a tool times out and an expert slips.
    """

    num_sessions: int = 12000
    num_rounds: int = 2
    rename_rate: float = 0.3
    num_repetitions: int = 4000
    num_demonstrations: int = 200
    text_characters: int = 2_000_000
    text_chunk: int = 600
    rate_cold: float = 0.15
    slip_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "seed" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


def _rng(config: RecordingConfig, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[config.seed, purpose]))


def text_documents(config: RecordingConfig) -> Iterator[str]:
    """Chunks of the library's train split, files in a seeded order, up to text_characters."""
    corpus = standard_library("train")
    paths = sorted(corpus.files)
    left = config.text_characters
    for number in _rng(config, 1).permutation(len(paths)):
        chunk: list[str] = []
        size = 0
        for line in corpus.files[paths[number]]:
            chunk.append(line)
            size += len(line) + 1
            if size >= config.text_chunk:
                yield "\n".join(chunk)
                left -= size
                chunk, size = [], 0
                if left <= 0:
                    return
        if chunk:
            yield "\n".join(chunk)
            left -= size


async def _sessions(
    config: RecordingConfig, on_session: Callable[[int], None]
) -> list[Demonstration]:
    rng = _rng(config, 2)
    fragments = name_fragments(standard_library("train"))
    sessions = []
    for number in range(config.num_sessions):
        session = await instructed_session(
            rng,
            fragments,
            num_rounds=config.num_rounds,
            rename_rate=config.rename_rate,
            rate_cold=config.rate_cold,
            slip_rate=config.slip_rate,
        )
        sessions.append(session)
        on_session(number + 1)
    return sessions


def _repetitions(config: RecordingConfig) -> Iterator[Demonstration]:
    rng = _rng(config, 4)
    fragments = name_fragments(standard_library("train"))
    return (repetition(rng, fragments) for _ in range(config.num_repetitions))


async def _demonstrations(config: RecordingConfig) -> list[Demonstration]:
    rng = _rng(config, 3)
    tasks = LibraryTasks("train", rate_cold=config.rate_cold)
    if config.num_demonstrations > len(tasks):
        raise ValueError(
            f"num_demonstrations is {config.num_demonstrations} but the library has "
            f"{len(tasks)} questions to demonstrate: ask for at most {len(tasks)}"
        )
    chosen = rng.permutation(len(tasks))[: config.num_demonstrations]
    return [
        await demonstrate(
            tasks.question(int(i)),
            tasks.task(int(i), seed=int(rng.integers(2**62))),
            tasks.env(),
            rng,
            config.slip_rate,
        )
        for i in chosen
    ]


def message_record(message: Message) -> dict[str, Any]:
    """A message as JSON; fields at their defaults are left out."""
    record: dict[str, Any] = {"role": message.role}
    if message.content:
        record["content"] = message.content
    if message.thought:
        record["thought"] = message.thought
    if message.tool_calls:
        record["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in message.tool_calls
        ]
    if message.outcome is not Outcome.OK:
        record["outcome"] = message.outcome.name.lower()
    return record


def _conversation(demonstration: Demonstration) -> dict[str, Any]:
    tools = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": [{"name": p.name, "type": p.type} for p in tool.parameters],
        }
        for tool in demonstration.tools
    ]
    messages = [message_record(m) for m in demonstration.messages]
    return {"tools": tools, "messages": messages}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def record(
    config: RecordingConfig, folder: Path, on_session: Callable[[int], None] = lambda done: None
) -> dict[str, int]:
    """Writes the four files into `folder`; returns the number of lines of each.

    on_session: told after each session, nearly all of the work, how many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sessions = asyncio.run(_sessions(config, on_session))
    demonstrations = asyncio.run(_demonstrations(config))
    return {
        "text": _write_lines(folder / "text.jsonl", ({"text": t} for t in text_documents(config))),
        "sessions": _write_lines(folder / "sessions.jsonl", map(_conversation, sessions)),
        "repetitions": _write_lines(
            folder / "repetitions.jsonl", map(_conversation, _repetitions(config))
        ),
        "demonstrations": _write_lines(
            folder / "demonstrations.jsonl", map(_conversation, demonstrations)
        ),
    }
