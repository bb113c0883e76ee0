"""Filters that judge text by its form: length, repetition, symbols."""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np

from agentx.data.curate.base import Document, Taken, prose_of, text_of
from agentx.data.formats import TextDocument

_PARAGRAPHS = re.compile(r"\n\s*\n")
_FIRST_TOP, _FIRST_REPEATED = 2, 5  # the n that the first threshold is for


@dataclasses.dataclass(frozen=True)
class Length:
    """Takes what has fewer or more characters than asked; no `max_characters` is no limit.

    Length(min_characters=4, max_characters=6):

        abc        taken: shorter than 4 characters
        abcd       kept
        abcdefg    taken: longer than 6 characters
    """

    min_characters: int = 0
    max_characters: int | None = None

    def __post_init__(self) -> None:
        if self.min_characters < 0:
            raise ValueError(f"Length.min_characters is {self.min_characters}; it is 0 or more")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"Length.max_characters is {self.max_characters}, under min_characters, "
                f"{self.min_characters}: no text is that long"
            )

    def __call__(self, document: Document) -> Document | Taken:
        length = len(text_of(document))
        if length < self.min_characters:
            return Taken(f"shorter than {self.min_characters} characters")
        if self.max_characters is not None and length > self.max_characters:
            return Taken(f"longer than {self.max_characters} characters")
        return document


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Takes what repeats itself, by the measures and thresholds of Gopher (arXiv:2112.11446, A1).

    Each threshold is the largest share that is kept:

        lines, paragraphs                        those that occurred before, of all
        line_characters, paragraph_characters    the characters in them, of all
        top_ngrams        n = 2, 3, 4: the characters in the n-gram that occurs most often
        repeated_ngrams   n = 5 to 10: the characters in n-grams that occurred before

    Characters count once, however many n-grams they lie in. Words are what spaces part. Gopher
    keeps no text of fewer than 50 words; in a shorter one a pair of words that comes twice is no
    sign of anything, so n-grams are looked at from `min_words` words on. A text and its trace are
    judged each by itself; so are, of a conversation, each thought and message of the assistant: the
    same call made twice is a step for `GoodSteps`, and what tools print repeats itself by nature.
    With min_words=4:

        a\\nb\\na\\nb\\na         taken: duplicate lines             3 of 5
        to be or not to be    taken: one 2-gram throughout       8 of 13 characters
        to be or to see       kept                               no pair comes twice
    """

    lines: float = 0.30
    line_characters: float = 0.20
    paragraphs: float = 0.30
    paragraph_characters: float = 0.20
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    min_words: int = 50

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            shares = value if isinstance(value, tuple) else (value,)
            if name != "min_words" and not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"Repetition.{name} is {value}; a share lies between 0 and 1")

    def __call__(self, document: Document) -> Document | Taken:
        return next(filter(None, map(self._judge, _written(document))), document)

    def _judge(self, text: str) -> Taken | None:
        for what, parts, share, character_share in (
            ("line", text.split("\n"), self.lines, self.line_characters),
            ("paragraph", _PARAGRAPHS.split(text), self.paragraphs, self.paragraph_characters),
        ):
            duplicates, characters = _duplicates(parts)
            if duplicates > share:
                return Taken(f"duplicate {what}s")
            if characters > character_share:
                return Taken(f"characters in duplicate {what}s")
        found = text.split()
        return self._ngrams(found) if len(found) >= self.min_words else None

    def _ngrams(self, found: list[str]) -> Taken | None:
        numbers: dict[str, int] = {}
        words = np.array([numbers.setdefault(word, len(numbers)) for word in found])
        lengths = np.array([len(word) for word in found])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        ngrams = words  # the number of the n-gram that begins at each word
        for n in range(2, _FIRST_REPEATED + len(self.repeated_ngrams)):
            if n > len(found):
                break
            pairs = ngrams[:-1] * len(numbers) + words[n - 1 :]
            _, first, ngrams, counts = np.unique(
                pairs, return_index=True, return_inverse=True, return_counts=True
            )
            if counts.max() == 1:
                break
            if n - _FIRST_TOP < len(self.top_ngrams):
                # Of several that are as frequent, the longest.
                size = np.where(counts == counts.max(), ends[first + n] - ends[first], 0)
                top = size.argmax()
                share = _covered(np.flatnonzero(ngrams == top), n, lengths)
                if share > self.top_ngrams[n - _FIRST_TOP]:
                    begin = int(first[top])
                    return Taken(f"one {n}-gram throughout", (" ".join(found[begin : begin + n]),))
            if n >= _FIRST_REPEATED:
                again = np.ones(len(ngrams), bool)
                again[first] = False
                share = _covered(np.flatnonzero(again), n, lengths)
                if share > self.repeated_ngrams[n - _FIRST_REPEATED]:
                    return Taken(f"repeated {n}-grams")
        return None


@dataclasses.dataclass(frozen=True)
class Symbols:
    """Takes text with more of a symbol for each word than `max_ratio`.

    Each of `symbols` is counted by itself, and words are what spaces part; the defaults are
    Gopher's (arXiv:2112.11446, A1), meant for web pages. "#" opens comments in source code: give
    other symbols there. Of a conversation, what user and assistant say is judged.
    Symbols(max_ratio=0.25):

        one two three #             kept              1 of 4
        one two three # #           taken: too many #    2 of 5
        read more ...               taken: too many ...  1 of 3
    """

    max_ratio: float = 0.1
    symbols: tuple[str, ...] = ("#", "...", "…")

    def __post_init__(self) -> None:
        if not self.max_ratio >= 0:
            raise ValueError(f"Symbols.max_ratio is {self.max_ratio}; it is 0 or more")
        if "" in self.symbols:
            raise ValueError("Symbols.symbols holds an empty string: give what to count")

    def __call__(self, document: Document) -> Document | Taken:
        text = prose_of(document)
        num_words = len(text.split())
        for symbol in self.symbols:
            if text.count(symbol) > self.max_ratio * num_words:
                return Taken(f"too many {symbol}")
        return document


def _written(document: Document) -> list[str]:
    """A text and its trace, or each thought and content of the assistant."""
    if isinstance(document, TextDocument):
        return [document.text, document.trace]
    parts = ((m.thought, m.content) for m in document.messages if m.role == "assistant")
    return [text for pair in parts for text in pair if text]


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """The share of parts that occurred before, and of the characters in them; blank ones apart."""
    counts = collections.Counter(stripped for part in parts if (stripped := part.strip()))
    if not counts:
        return 0.0, 0.0
    characters = sum(len(part) * n for part, n in counts.items())
    again = sum(len(part) * (n - 1) for part, n in counts.items())
    return 1 - len(counts) / counts.total(), again / characters


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """The share of characters in the words that n-grams from `starts` on cover.

    starts: i[any], the first words of the n-grams. lengths: i[words], of each word.
    """
    edges = np.zeros(len(lengths) + 1, np.int64)
    edges[starts] += 1
    np.subtract.at(edges, starts + n, 1)
    return float(lengths[np.cumsum(edges[:-1]) > 0].sum() / lengths.sum())
