"""Times the way from a token store to batches, on one core, beside a plain memmap reader.

    python -m benchmarks.data [--conversations PATH --texts PATH] [--repeats 5]

Builds a store of each (of made-up tool sessions and texts, where no path is given) with a
SentencePiece tokenizer that is trained on them, and makes batches of 8 rows of 4096 tokens:
reading, objective, packing. The memmap reader cuts rows at random places of one array of ids: no
documents, no weights, no packing. All take turns; figures are medians over the turns, of CPU
seconds, in which the threads that TensorStore reads with count too. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agentx.data.build import build
from agentx.data.formats import TextDocument, read_documents
from agentx.data.objectives import (
    FillInTheMiddle,
    InfillCall,
    InfillPlan,
    NextToken,
    Objective,
    Recover,
    ToolChoice,
    ToolRename,
)
from agentx.data.pipeline import MixturePipeline, Source
from agentx.data.prepare import BuildConfig, Input
from agentx.data.store import TokenStore
from agentx.tokenizer import Tokenizer
from benchmarks import workload

_ROWS, _LENGTH = 8, 4096
_SECONDS = 0.5  # of a turn
_VOCAB = 4096
_SESSIONS, _TEXTS, _WORDS = 1000, 400, 3000


def _made_up(folder: Path, seed: int = 0) -> tuple[str, str]:
    """1,000 tool sessions of about 1,500 tokens and 400 texts of about 1,500 words, as JSONL."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 9, _WORDS)]

    def say(count: int) -> str:
        return " ".join(words[i] for i in rng.zipf(1.3, count) % _WORDS)

    tools = [
        {"name": name, "description": say(8), "parameters": [{"name": say(1)} for _ in range(2)]}
        for name in ("search", "open", "list", "calculate")
    ]

    def session() -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": say(20)}]
        for _ in range(int(rng.integers(4, 12))):
            tool = tools[int(rng.integers(len(tools)))]
            arguments = {p["name"]: say(2) for p in tool["parameters"]}
            outcome = ("ok", "failed", "recovered")[int(rng.integers(3))]
            call = {"name": tool["name"], "arguments": arguments}
            messages += [
                {"role": "assistant", "thought": say(15), "tool_calls": [call], "outcome": outcome},
                {"role": "tool", "content": say(60)},
            ]
        return {"messages": [*messages, {"role": "assistant", "content": say(10)}], "tools": tools}

    sessions, texts = folder / "sessions.jsonl", folder / "texts.jsonl"
    sessions.write_text("\n".join(json.dumps(session()) for _ in range(_SESSIONS)))
    lengths = rng.geometric(1 / 1500, _TEXTS)
    texts.write_text("\n".join(json.dumps({"text": say(int(n))}) for n in lengths))
    return str(sessions), str(texts)


def _stores(
    folder: Path, conversations: str, texts: str, field: str
) -> tuple[TokenStore, TokenStore, str]:
    """A store of each, and the path of their tokenizer."""

    def words() -> Iterator[str]:
        for path, of in ((conversations, ""), (texts, field)):
            for number, document in enumerate(read_documents(path, field=of, on_error="skip")):
                if number < 200:
                    if isinstance(document, TextDocument):
                        yield document.text
                    else:
                        yield "\n".join(message.content for message in document.messages)

    path = str(folder / "tokenizer.model")
    Tokenizer.train(words(), _VOCAB).save(path)
    told, said = (
        build(BuildConfig((Input(given, field=of),), path, str(folder / name), on_error="skip"))
        for given, of, name in ((conversations, "", "told"), (texts, field, "said"))
    )
    return told, said, path


def _memmap(folder: Path, store: TokenStore) -> Callable[[int], int]:
    """A reader of random rows of one array, which is what others do."""
    path = folder / "ids.npy"
    np.save(path, np.concatenate([trajectory.ids for trajectory in store]))
    ids = np.load(path, mmap_mode="r")

    def read(step: int) -> int:
        starts = np.random.default_rng(step).integers(0, len(ids) - _LENGTH - 1, _ROWS)
        rows = np.stack([ids[start : start + _LENGTH + 1] for start in starts])
        tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        assert tokens.shape == targets.shape
        return tokens.size

    return read


def run(conversations: str, texts: str, repeats: int) -> dict[str, Any]:
    """The fields of the JSON line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        field = "" if conversations else "text"
        if not conversations:
            conversations, texts = _made_up(folder)
        told, said, tokenizer = _stores(folder, conversations, texts, field)
        objectives: dict[str, tuple[TokenStore, Objective]] = {
            "next_token": (told, NextToken()),
            "infill_call": (told, InfillCall()),
            "infill_plan": (told, InfillPlan()),
            "recover": (told, Recover()),
            "tool_choice": (told, ToolChoice(tokenizer, pool=told.path)),
            "tool_rename": (told, ToolRename(tokenizer)),
            "fill_in_the_middle": (said, FillInTheMiddle(tokenizer, rate=1.0, lines=0.0)),
        }
        readers: dict[str, Callable[[int], int]] = {"memmap": _memmap(folder, told)}
        fill = {}
        for title, (store, objective) in objectives.items():
            pipeline = MixturePipeline([Source(title, store, objective)], _ROWS, _LENGTH, 0)
            fill[title] = round(pipeline.plans[0].fill, 4)
            readers[title] = lambda step, p=pipeline: p.batch(step).tokens.size
        rates: dict[str, list[float]] = {title: [] for title in readers}
        for turn in range(repeats):
            for title, read in readers.items():
                read(0)
                tokens, step, start = 0, 1000 * turn, time.process_time()
                while time.process_time() - start < _SECONDS:
                    tokens += read(step)
                    step += 1
                rates[title].append(tokens / (time.process_time() - start))
        medians = {title: statistics.median(found) for title, found in rates.items()}
        return {
            "workload": "data",
            "documents": [len(told), len(said)],
            "tokens": [told.num_tokens, said.num_tokens],
            "tokens_per_s": {title: round(rate) for title, rate in medians.items()},
            "of_memmap": {
                title: round(rate / medians["memmap"], 3) for title, rate in medians.items()
            },
            "fill": fill,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", default="", help="what agentx data build reads")
    parser.add_argument("--texts", default="", help="files of text")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if bool(given.conversations) != bool(given.texts):
        parser.error("give both --conversations and --texts, or neither")
    workload.print_result(run(given.conversations, given.texts, given.repeats))
