"""Documents from the command line to a token store, and from a store to the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import rich.console
import rich.text

from agentx.data.formats import (
    conversation_trajectory,
    read_conversations,
    read_text_jsonl,
    read_text_tree,
    text_trajectory,
)
from agentx.data.objectives import NextToken
from agentx.data.store import TokenStore
from agentx.render import ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Role, Trajectory

COLOURS = {
    Role.TEXT: "default",
    Role.SYSTEM: "bright_black",
    Role.USER: "blue",
    Role.THOUGHT: "magenta",
    Role.CALL: "green",
    Role.ARGUMENTS: "cyan",
    Role.OBSERVATION: "yellow",
    Role.ANSWER: "red",
}


def read_trajectories(
    paths: Sequence[Path], field: str, tokenizer: Tokenizer
) -> Iterator[Trajectory]:
    """The documents of all paths in order. Raises ValueError for the first that cannot be read.

    A .jsonl file holds conversations, or texts under `field` where that is given; any other file
    is a text, and a folder stands for the texts below it.
    """
    renderer = ToolRenderer(tokenizer)
    for path in paths:
        if path.suffix != ".jsonl":
            yield from (text_trajectory(d, tokenizer) for d in read_text_tree(path))
        elif field:
            yield from (text_trajectory(d, tokenizer) for d in read_text_jsonl(path, field))
        else:
            yield from (conversation_trajectory(c, renderer) for c in read_conversations(path))


def print_document(store_path: Path, tokenizer_path: Path, index: int) -> int:
    """Prints one document of a store and the key to its colours; returns how many there are."""
    tokenizer = Tokenizer.load(tokenizer_path)
    store = TokenStore.open(store_path, tokenizer_fingerprint=tokenizer.fingerprint)
    if not 0 <= index < len(store):
        raise ValueError(f"--index {index}: {store_path} holds documents 0 to {len(store) - 1}")
    example = NextToken()(store[index], seed=0, epoch=0, index=index)
    shown = rich.text.Text()
    for token, role, weight in zip(example.ids, example.roles, example.weights, strict=True):
        dim = "" if weight else " dim"
        shown.append(tokenizer.decode([int(token)]), style=COLOURS[Role(role)] + dim)
    key = rich.text.Text("\nroles: ")
    for role, colour in COLOURS.items():
        key.append(f"{role.name.lower()} ", style=colour)
    key.append("dim: no loss", style="dim")
    console = rich.console.Console(highlight=False)
    console.print(shown)
    console.print(key)
    return len(store)
