"""The markers of the tool format, and the calls that a piece of a document holds whole."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from agentx.tokenizer import SPECIAL_TOKENS, Tokenizer
from agentx.trajectory import Outcome, Role, Trajectory

BOS = SPECIAL_TOKENS.index("<|bos|>")
SYSTEM = SPECIAL_TOKENS.index("<|system|>")
THOUGHT = SPECIAL_TOKENS.index("<|thought|>")
CALL = SPECIAL_TOKENS.index("<|call|>")
ARGUMENTS = SPECIAL_TOKENS.index("<|arguments|>")
SEP = SPECIAL_TOKENS.index("<|sep|>")
END = SPECIAL_TOKENS.index("<|end|>")
FIM_PREFIX = SPECIAL_TOKENS.index("<|fim_prefix|>")
FIM_SUFFIX = SPECIAL_TOKENS.index("<|fim_suffix|>")
FIM_MIDDLE = SPECIAL_TOKENS.index("<|fim_middle|>")
BACK = SPECIAL_TOKENS.index("<|back|>")


class Call(NamedTuple):
    """Where a call stands in a piece: from its marker, at `start`, up to behind its <|end|>.

    step: where the thought before it begins, or `start` where there is none. arguments: where they
    begin.
    """

    step: int
    start: int
    arguments: int
    stop: int
    outcome: Outcome


def whole_calls(trajectory: Trajectory) -> list[Call]:
    """The calls of which the piece at hand holds all, in order."""
    calls: list[Call] = []
    start, thought = 0, -1
    for span, following in itertools.pairwise(trajectory.spans):
        arguments = start + len(span.ids)
        if (
            span.role is Role.CALL
            and following.role is Role.ARGUMENTS
            and span.ids[0] == CALL
            and following.ids[-1] == END
        ):
            step, stop = start if thought < 0 else thought, arguments + len(following.ids)
            calls.append(Call(step, start, arguments, stop, span.outcome))
        thought = start if span.role is Role.THOUGHT else -1
        start = arguments
    return calls


@functools.lru_cache(maxsize=8)
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a file, read once."""
    return Tokenizer.load(path)
