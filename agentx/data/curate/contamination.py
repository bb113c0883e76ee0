"""Decontamination: what shares an n-gram of words with an evaluation set is taken out."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from agentx.data.curate.base import Document, Filter, Taken, ngrams_of, prose_of, text_of, words
from agentx.data.formats import read_documents


class Hit(NamedTuple):
    """An n-gram of an evaluation item, `FILE:LINE`, that a document holds."""

    item: str
    ngram: str
    document: str


class _Index(NamedTuple):
    """The n-grams of all items, with the items that each is of, by their size in words."""

    ngrams: dict[int, dict[str, list[str]]]
    num_items: int
    too_short: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Takes documents that hold `n` words in a row of an item of an evaluation set.

    files: paths or globs, in any format that is read; a record is an item. fields: of records of
    texts, the strings that make up an item; none where they are conversations, of which it is what
    user and assistant say. Words have neither case nor punctuation (see `words`), as in appendix C
    of GPT-3 (arXiv:2005.14165), whose numbers the defaults are. An item of fewer than `n` words is
    sought whole; one of fewer than `min_words` would hit what has nothing to do with it, and isn't
    sought but listed in `too_short`; a store's notes and its build say how many there are. With
    n=4, min_words=3 and the items "How far is it to Rome?" and "Rome, or Bern!":

        How far IS it, really?        taken: contaminated    item 1: how far is it
        We went to rome or bern.      taken: contaminated    item 2: rome or bern
        How far it is to Rome         kept
    """

    files: tuple[str, ...]
    fields: tuple[str, ...] = ()
    n: int = 13
    min_words: int = 8

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("Decontaminate.files is empty: name the files of an evaluation set")
        if not 1 <= self.min_words <= self.n:
            raise ValueError(
                f"Decontaminate.min_words is {self.min_words}; it is from 1 to n, {self.n}"
            )

    def __call__(self, document: Document) -> Document | Taken:
        hits = self.hits(document)
        if not hits:
            return document
        return Taken("contaminated", tuple(f"{hit.item}: {hit.ngram}" for hit in hits))

    def hits(self, document: Document) -> list[Hit]:
        """Each item that the document holds something of, with the first n-gram of it."""
        found: dict[str, Hit] = {}
        spoken = words(text_of(document))
        for size, ngrams in self._index.ngrams.items():
            for ngram in ngrams_of(spoken, size):
                for item in ngrams.get(ngram, ()):
                    found.setdefault(item, Hit(item, ngram, document.name))
        return list(found.values())

    @property
    def num_items(self) -> int:
        """How many items the evaluation sets have."""
        return self._index.num_items

    @property
    def too_short(self) -> tuple[str, ...]:
        """The items of fewer than `min_words` words, which are not sought."""
        return self._index.too_short

    @functools.cached_property
    def _index(self) -> _Index:
        """Made from the files when it is first asked for.

        Raises ValueError for a file that isn't there, that cannot be read, or that holds nothing.
        """
        ngrams: dict[int, dict[str, list[str]]] = collections.defaultdict(dict)
        num_items, too_short = 0, []
        for item, text in itertools.chain(*(_items(file, self.fields) for file in self.files)):
            num_items += 1
            spoken = words(text)
            if len(spoken) < self.min_words:
                too_short.append(item)
                continue
            size = min(self.n, len(spoken))
            for ngram in set(ngrams_of(spoken, size)):
                ngrams[size].setdefault(ngram, []).append(item)
        return _Index(ngrams, num_items, tuple(too_short))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process reads the files for itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def evaluation_notes(filters: Iterable[Filter]) -> dict[str, Any]:
    """How many items of evaluation sets were sought, as a store's notes say it; {} for no sets."""
    given = [filter for filter in filters if isinstance(filter, Decontaminate)]
    too_short = sum(len(filter.too_short) for filter in given)
    sought = sum(filter.num_items for filter in given) - too_short
    return {"evaluation": {"sought": sought, "too short": too_short}} if given else {}


def _items(pattern: str, fields: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The name and text of each item."""
    texts: dict[str, list[str]] = {}
    for field in fields or ("",):
        for document in read_documents(pattern, field=field):
            texts.setdefault(document.name, []).append(prose_of(document))
    yield from ((name, "\n".join(parts)) for name, parts in texts.items())
