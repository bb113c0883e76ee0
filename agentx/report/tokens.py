"""Trajectories for the page: which token is what, and how much loss it carries.

`trajectory_record` makes an entry of trajectories.json from a Trajectory; `view` turns an entry
into what the template loops over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentx.trajectory import Origin, Role, Trajectory

ROLES = tuple(role.name.lower() for role in Role)


def trajectory_record(
    trajectory: Trajectory,
    texts: Sequence[str],
    weights: np.ndarray,
    *,
    title: str,
    stage: str,
    task: str,
    outcome: str,
    advantage: float | None = None,
) -> dict[str, Any]:
    """One entry of trajectories.json.

    texts: what each token shows as. weights: f32[len(trajectory)], the loss weight of each token as
      a target. advantage: the trajectory's, shown on its sampled tokens; None where it has none.
    """
    if not len(texts) == len(weights) == len(trajectory):
        raise ValueError(
            f"a trajectory of {len(trajectory)} tokens came with {len(texts)} texts "
            f"and {len(weights)} weights"
        )
    tokens = []
    remaining = zip(texts, weights, strict=True)
    for span in trajectory.spans:
        sampled = span.origin is Origin.SAMPLED
        for i, token_id in enumerate(span.ids):
            text, weight = next(remaining)
            tokens.append(
                {
                    "text": text,
                    "id": int(token_id),
                    "role": span.role.name.lower(),
                    "origin": span.origin.name.lower(),
                    "outcome": span.outcome.name.lower(),
                    "weight": float(weight),
                    "advantage": float(advantage) if sampled and advantage is not None else None,
                    "logprob": float(span.logprobs[i]) if span.logprobs is not None else None,
                }
            )
    return {
        "title": title,
        "stage": stage,
        "task": task,
        "reward": float(trajectory.reward),
        "outcome": outcome,
        "tokens": tokens,
    }


def roles_used(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The roles that occur, in the order of their numbers."""
    used = {token["role"] for record in records for token in record["tokens"]}
    return [role for role in ROLES if role in used]


def view(record: Mapping[str, Any], largest: float | None = None) -> dict[str, Any]:
    """The entry with its tokens gathered into spans, checked, and ready to print.

    Each token gets `pieces`, its text cut into visible characters and whitespace, and `shade`, its
    weight relative to the largest, in [0, 1]: to that given, or to the trajectory's own.
    """
    tokens = record["tokens"]
    for token in tokens:
        if token["role"] not in ROLES:
            raise ValueError(
                f"trajectory {record['title']!r} has a token of role {token['role']!r}: "
                f"want one of {', '.join(ROLES)}"
            )
    largest = largest or max((abs(t["weight"]) for t in tokens), default=0.0) or 1.0
    groups = itertools.groupby(tokens, key=lambda t: (t["role"], t["origin"], t["outcome"]))
    spans = [
        {
            "role": role,
            "origin": origin,
            "outcome": outcome,
            "tokens": [_token_view(t, largest) for t in group],
        }
        for (role, origin, outcome), group in groups
    ]
    return {
        **record,
        "spans": spans,
        "num_tokens": len(tokens),
        "num_trained": sum(t["weight"] != 0 for t in tokens),
        "tone": "" if record["reward"] is None else "good" if record["reward"] > 0 else "bad",
    }


def _token_view(token: Mapping[str, Any], largest_weight: float) -> dict[str, Any]:
    logprob, advantage = token.get("logprob"), token.get("advantage")
    return {
        "id": token["id"],
        "pieces": visible_pieces(token["text"]),
        "weight": f"{token['weight']:.4g}",
        "place": token.get("place"),
        "position": token.get("position"),
        "is_marker": token.get("is_marker", False),
        "advantage": None if advantage is None else f"{advantage:+.4g}",
        "logprob": None
        if logprob is None
        else f"{logprob:.4f} (p = {math.exp(min(logprob, 0.0)):.3f})",
        "shade": f"{abs(token['weight']) / largest_weight:.2f}",
        # A negative advantage pushes the token's probability down, a negative weight flips that.
        "pushed_down": (advantage or 0.0) * token["weight"] < 0
        or (advantage is None and token["weight"] < 0),
    }


# A byte that is no character is this much more, in the text of its token (PEP 383).
_BYTE = 0xDC00
# What stands for a whitespace character on the page.
_MARKS: dict[str, str] = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


def visible_pieces(text: str) -> list[tuple[str, str]]:
    """Text cut into ("text", characters), ("space", marks), ("newline", mark) and ("code", ...).

    A code is a character that shows as nothing, or changes how others show, by its number; or a
    byte that is no character by itself, as `token_text` has it.

    visible_pieces("a \\n\\x1b")  ->  [("text", "a"), ("space", "·"), ("newline", "↵"),
                                    ("code", "\\\\u001b")]
    """

    def kind(character: str) -> str:
        if character == "\n":
            return "newline"
        if character in _MARKS:
            return "space"
        return "text" if character.isprintable() else "code"

    def show(character: str) -> str:
        number = ord(character)
        if character in _MARKS:
            return _MARKS[character]
        if character.isprintable():
            return character
        if _BYTE <= number < _BYTE + 256:
            return f"\\x{number - _BYTE:02x}"
        return f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"

    return [(name, "".join(map(show, run))) for name, run in itertools.groupby(text, kind)]


def token_text(data: bytes) -> str:
    """What a token spells. Bytes that are no character by themselves become lone surrogates.

    So the texts of several tokens can be put together again: `whole_text`.
    """
    return data.decode("utf-8", "surrogateescape")


def whole_text(texts: Sequence[str]) -> str:
    """The text of several tokens; bytes that several of them share come together again."""
    return token_text("".join(texts).encode("utf-8", "surrogateescape"))
