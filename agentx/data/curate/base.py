"""What a filter is, what it says of a document that it takes, and the counts that add up.

A filter gives a document back, as it is or changed, or `Taken` with a reason. It is pure: it knows
this document and its own fields. So filters run in any process, in any order of documents, and the
counts of all processes are one sum.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

from agentx.data.formats import Document, TextDocument
from agentx.trajectory import Message

# Scripts that put no space between words: there, a character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class Taken(NamedTuple):
    """A document is left out. `evidence` says what in it is to blame, for a report.

    The reason is one of few: documents are counted by it.
    """

    reason: str
    evidence: tuple[str, ...] = ()


class Filter(Protocol):
    """A frozen dataclass that is called with a document."""

    def __call__(self, document: Document) -> Document | Taken: ...


class TakenRow(NamedTuple):
    """What one filter took for one reason."""

    filter: str
    reason: str
    documents: int
    characters: int


@dataclasses.dataclass
class FilterCounts:
    """How many documents filters saw, kept and took, and how many of those kept were changed.

    read = kept + taken, in documents and in characters, always; a document counts with the
    characters that it came with. Counts of several processes are added by `+`.
    """

    read: int = 0
    read_characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    taken: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    taken_characters: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: FilterCounts) -> FilterCounts:
        fields = (field.name for field in dataclasses.fields(self))
        return FilterCounts(*(getattr(self, name) + getattr(other, name) for name in fields))

    def keep(self, characters: int) -> None:
        """One more is read and kept."""
        self.read += 1
        self.kept += 1
        self.read_characters += characters
        self.kept_characters += characters

    def drop(self, filter: str, reason: str, characters: int) -> None:
        """One of those kept is taken after all."""
        self.kept -= 1
        self.kept_characters -= characters
        self.taken[filter, reason] += 1
        self.taken_characters[filter, reason] += characters

    @property
    def rows(self) -> list[TakenRow]:
        """What was taken, by filter and reason, in the order of their names."""
        return [
            TakenRow(filter, reason, documents, self.taken_characters[filter, reason])
            for (filter, reason), documents in sorted(self.taken.items())
        ]


def run_filters(
    filters: Iterable[Filter], document: Document, counts: FilterCounts | None = None
) -> Document | Taken:
    """The document after all filters, or what the first of them that takes it says.

    Each filter gets what the one before it gave.
    """
    counts = FilterCounts() if counts is None else counts
    characters = len(text_of(document))
    counts.keep(characters)
    changed_by = []
    for filter in filters:
        name = type(filter).__name__
        result = filter(document)
        if isinstance(result, Taken):
            counts.drop(name, result.reason, characters)
            return result
        if result is not document:
            changed_by.append(name)
        document = result
    counts.changed.update(changed_by)
    return document


def text_of(document: Document) -> str:
    """All text of a document: a text and its trace, or thoughts, contents and calls as JSON.

    user       Where is it?            Where is it?
    assistant  (a typo) find(x=1)      a typo
                                       {"name": "find", "arguments": {"x": 1}}
    tool       os.py                   os.py
    """
    if isinstance(document, TextDocument):
        return "\n".join(filter(None, (document.text, document.trace)))
    return text_of_messages(document.messages)


def prose_of(document: Document) -> str:
    """The same of a text. Of a conversation, what user and assistant think and say: no calls."""
    if isinstance(document, TextDocument):
        return text_of(document)
    spoken = (m for m in document.messages if m.role in ("user", "assistant"))
    return text_of_messages(dataclasses.replace(m, tool_calls=()) for m in spoken)


def text_of_messages(messages: Iterable[Message]) -> str:
    """The text of some messages, as `text_of` says, a part a line."""
    return "\n".join(part for message in messages for part in _parts(message) if part)


def _parts(message: Message) -> Iterator[str]:
    yield message.thought
    yield message.content
    for call in message.tool_calls:
        yield json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


def words(text: str) -> list[str]:
    """Words without case and punctuation: what n-grams of duplicates and evaluation sets are of.

    A word is a run of letters, digits and underscores; in scripts that put no spaces between words
    it is a character:  "It's 3.50!"  it s 3 50
    """
    return _WORD.findall(text.lower())


def ngrams_of(words: Sequence[str], n: int) -> Iterator[str]:
    """Each `n` words that follow each other, with spaces between them."""
    return (" ".join(words[at : at + n]) for at in range(len(words) - n + 1))


def library(module: str, user: str) -> ModuleType:
    """A module of the extra `curate`. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise ValueError(f"{user} needs {package}: pip install agentx[curate]") from None
