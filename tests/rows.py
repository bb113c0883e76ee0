"""Documents for objectives, aligned rows as their docstrings show them, and small vocabularies."""

import re
import textwrap

import numpy as np

from agentx.tokenizer import SPECIAL_TOKENS, Piece
from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory

WORDS = (*SPECIAL_TOKENS, "go", "ls", "x", ".", "no", "2", "import", "os", "im", "port")


def span(role, text, outcome=Outcome.OK):
    ids = np.array([WORDS.index(word) for word in text.split()], np.int32)
    return Span(role, ids, Origin.DATA, outcome)


def recovery():
    """A call that fails, the one that works, and the answer."""
    failed, recovered = Outcome.FAILED, Outcome.RECOVERED
    return Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> ls", failed),
            span(Role.ARGUMENTS, "<|arguments|> x <|end|>", failed),
            span(Role.OBSERVATION, "<|observation|> no <|end|>", failed),
            span(Role.CALL, "<|call|> ls", recovered),
            span(Role.ARGUMENTS, "<|arguments|> . <|end|>", recovered),
            span(Role.OBSERVATION, "<|observation|> 2 <|end|>"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )


def one_call():
    """A call and an answer."""
    return Trajectory(
        [
            span(Role.USER, "<|bos|> <|user|> go"),
            span(Role.CALL, "<|call|> ls"),
            span(Role.ARGUMENTS, "<|arguments|> x <|end|>"),
            span(Role.ANSWER, "<|answer|> 2 <|end|>"),
        ]
    )


def text():
    """A text."""
    return Trajectory([span(Role.TEXT, "<|bos|> import os <|end|>")])


def words(example):
    """The tokens of an example, as words."""
    return " ".join(WORDS[i] for i in example.ids)


class FieldTokenizer:
    """A token for each word, or each part of one that begins with "_", and for any other sign.

    Words are numbered as they come.
    """

    fingerprint = "fields"

    def __init__(self):
        self.pieces = [Piece(name.encode(), "special") for name in SPECIAL_TOKENS]
        self.special = {name: i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text):
        ids = []
        for field in re.findall(r" ?_?[a-z0-9]+|.|\n", text):
            if field not in self.words:
                self.pieces.append(Piece(field.encode(), "text"))
            ids.append(self.words.index(field))
        return ids

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    @property
    def words(self):
        return [piece.data.decode() for piece in self.pieces]


def table(example, rows, columns, words=WORDS):
    """Aligned rows of an example, as the docstrings show them, so many tokens across."""
    cells = {
        "token": [words[i].strip(" ").replace("\n", "\\n") for i in example.ids],
        "role": [Role(r).name.lower() for r in example.roles],
        "outcome": [Outcome(o).name.lower() for o in example.outcomes],
        "weight": [f"{w:g}" for w in example.weights],
    }
    lines, start = [], 0
    for count in columns:
        own = slice(start, start + count)
        widths = [max(len(cells[row][i]) for row in rows) for i in range(*own.indices(10**6))]
        for row in rows:
            padded = [c.rjust(w) for c, w in zip(cells[row][own], widths, strict=True)]
            lines.append(f"{row:<8} {' '.join(padded)}")
        start += count
    assert start == len(example)
    return lines


def assert_shown_in(docstring, lines):
    text = textwrap.dedent(docstring)
    for line in lines:
        assert line in text, f"the docstring has not: {line}"
