"""Fill in the middle, of plain text: cut at characters or at lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from agentx.data.objectives.base import CUT, Example, check_share, random_generator
from agentx.data.objectives.calls import load_tokenizer
from agentx.data.objectives.weights import PlainText
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Role, Trajectory

_MARKERS = 4
# Text that is encoded in three parts may take a few tokens more than as one.
_SLACK = 12


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Cuts text in three and moves the middle to the end (arXiv:2207.14255), every token trained.

    A cut may fall within a token, as it does where an editor asks: each part is then encoded anew,
    by itself. It falls between characters, never within one. Of this document:

        <|bos|> import os <|end|>

    PSM, prefix, suffix, middle:

        token    <|bos|> <|fim_prefix|> im <|fim_suffix|> <|end|>
        weight         0              0  1              0       1
        token    <|fim_middle|> port os <|end|>
        weight                0    1  1       1

    SPM, whose prefix and middle are one text:

        token    <|bos|> <|fim_prefix|> <|fim_suffix|> <|end|>
        weight         0              0              0       1
        token    <|fim_middle|> im port os <|end|>
        weight                0  1    1  1       1

    tokenizer: the file of the one that the store was built with.
    rate: the probability that a document is rearranged; the others are left as they are. In a row
      of several documents, or pieces of them, each is drawn for by itself.
    spm: the share of SPM among the rearranged, the rest being PSM.
    lines: the share that is cut between lines alone, the rest being cut between any characters.
    Documents with anything but text in them are left alone. Where parts encoded anew would not fit
    into the room that is reserved, the cut moves to the next border of tokens.
    """

    tokenizer: str
    rate: float = 0.5
    spm: float = 0.5
    lines: float = 0.5

    def __post_init__(self) -> None:
        for name in ("rate", "spm", "lines"):
            check_share(f"FillInTheMiddle.{name}", getattr(self, name))

    def room(self, trajectory: Trajectory) -> int:
        """3 markers, an <|end|>, and what parts may take more than the whole."""
        return _MARKERS + _SLACK if self.rate > 0 and _is_text(trajectory) else 0

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        example = PlainText()(trajectory, seed, epoch, index)
        rng = random_generator(seed, epoch, index, CUT)
        by_lines, is_spm = rng.random() < self.lines, rng.random() < self.spm
        if rng.random() >= self.rate or not _is_text(trajectory):
            return example
        ids, markers = example.ids.tolist(), trajectory.markers
        head = ids[: int(ids[0] == markers.bos)]
        tail = ids[len(ids) - int(ids[-1] == markers.end) :]
        body = ids[len(head) : len(ids) - len(tail)]
        parts = _cut(load_tokenizer(self.tokenizer), body, rng, by_lines=by_lines)
        if parts is None:
            return example
        prefix, middle, suffix = parts
        opened, parted, filled = markers.fim_prefix, markers.fim_suffix, markers.fim_middle
        if is_spm:
            new = [*head, opened, parted, *suffix, *tail, filled, *prefix, *middle, markers.end]
        else:
            new = [*head, opened, *prefix, parted, *suffix, *tail, filled, *middle, markers.end]
        made = np.array(new, np.int32)
        weights = np.ones(len(made), np.float32)
        weights[np.isin(made, (opened, parted, filled))] = 0.0
        weights[0] = 0.0
        roles, origins, outcomes = (
            np.full(len(made), x[0]) for x in (example.roles, example.origins, example.outcomes)
        )
        return Example(made, weights, roles, origins, outcomes)


def _is_text(trajectory: Trajectory) -> bool:
    return all(span.role is Role.TEXT for span in trajectory.spans)


def _cut(
    tokenizer: Tokenizer, ids: Sequence[int], rng: np.random.Generator, *, by_lines: bool
) -> list[list[int]] | None:
    """Prefix, middle and suffix of a text, or None where there is no place for two cuts."""
    if not ids:
        return None
    pieces = [tokenizer.pieces[i].data for i in ids]
    data = np.frombuffer(b"".join(pieces), np.uint8)
    is_start = np.append((data & 0xC0) != 0x80, True)  # of a character, or of nothing at the end
    places = np.flatnonzero(is_start)
    if by_lines:
        places = places[(places == 0) | (places == len(data)) | (data[places - 1] == ord("\n"))]
    if len(places) < 2:
        return None
    begin, end = sorted(int(x) for x in rng.choice(places, 2, replace=False))
    try:
        texts = [bytes(data[a:b]).decode() for a, b in ((0, begin), (begin, end), (end, None))]
    except UnicodeDecodeError:  # a piece of a document may begin or end within a character
        texts = []
    parts = [tokenizer.encode(text) for text in texts]
    if parts and sum(map(len, parts)) <= len(ids) + _SLACK:
        return parts
    borders = np.cumsum([0, *map(len, pieces)])
    allowed = np.flatnonzero(is_start[borders])
    first, second = (int(allowed[np.searchsorted(borders[allowed], x)]) for x in (begin, end))
    return [list(ids[:first]), list(ids[first:second]), list(ids[second:])]
