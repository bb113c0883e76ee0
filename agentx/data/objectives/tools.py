"""Other names for the tools on offer, so that tools are learnt from what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set

import numpy as np

from agentx.data.objectives.base import (
    RENAME,
    Example,
    Objective,
    check_share,
    check_steady,
    random_generator,
)
from agentx.data.objectives.offer import field_encoder, read_offer, with_ids, with_offer
from agentx.data.objectives.weights import NextToken
from agentx.trajectory import Markers, Parameter, Role, Span, ToolSpec, Trajectory

_NEXT_TOKEN = NextToken()

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_MOST_SYLLABLES = 3
# The most tokens that a new name may take: its bytes, and a space before it.
_LONGEST = 2 * _MOST_SYLLABLES + 1


@dataclasses.dataclass(frozen=True)
class ToolRename:
    """Gives the tools of a document made-up names, and lists them and their parameters anew.

    A name that says nothing leaves the description to choose by. Within a document a tool has one
    name, in the list and in every call; arguments follow their parameters. Another objective then
    does what it does. Of this document

        token    <|bos|> <|system|>   find      (   name      ,   line      )      :   walk     \\n
        role      system     system system system system system system system system system system
        weight         0          0      0      0      0      0      0      0      0      0      0

        token        ls      (   path      )      :   list
        role     system system system system system system
        weight        0      0      0      0      0      0

        token    <|user|>   go <|call|> find <|arguments|>         x   <|sep|>         7   <|end|>
        role         user user     call call     arguments arguments arguments arguments arguments
        weight          0    0        1    1             1         1         1         1         1

    comes, for instance,

        token    <|bos|> <|system|>   fepi      (   pabo      )      :   list
        role      system     system system system system system system system
        weight         0          0      0      0      0      0      0      0

        token        \\n   zezo      ( fevulo      , lelufu      )      :   walk
        role     system system system system system system system system system
        weight        0      0      0      0      0      0      0      0      0

        token    <|user|>   go <|call|> zezo <|arguments|>         7   <|sep|>         x   <|end|>
        role         user user     call call     arguments arguments arguments arguments arguments
        weight          0    0        1    1             1         1         1         1         1

    tokenizer: the file of the one that the store was built with.
    rate: the probability that a document that lists tools is changed.
    base: what is done with the document then, changed or not.
    Parameters change places only where every call gives all of them, for an argument has its place
    alone to say which it is. What a thought, a user or a result says of a tool stays as it is, and
    so does a document whose piece at hand lacks the list.
    """

    tokenizer: str
    rate: float = 0.5
    base: Objective = _NEXT_TOKEN

    def __post_init__(self) -> None:
        check_steady("ToolRename.base", [self.base])
        check_share("ToolRename.rate", self.rate)

    def room(self, trajectory: Trajectory) -> int:
        """That of `base`, and a longest name for each tool, each parameter and each call."""
        room = self.base.room(trajectory)
        if not self.rate:
            return room
        tools = read_offer(trajectory, self.tokenizer).tools
        num_calls = sum(span.role is Role.CALL for span in trajectory.spans) if tools else 0
        return room + _LONGEST * (num_calls + sum(1 + len(t.parameters) for t in tools))

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        rng = random_generator(seed, epoch, index, RENAME)
        if rng.random() < self.rate:
            trajectory = self._renamed(trajectory, rng)
        return self.base(trajectory, seed, epoch, index)

    def _renamed(self, trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
        tools, rest = read_offer(trajectory, self.tokenizer)
        if not tools:
            return trajectory
        encode, markers = field_encoder(self.tokenizer).encode, trajectory.markers
        old_ids = [np.array([markers.call, *encode(t.name)], np.int32).tobytes() for t in tools]
        orderly = {ids for ids, t in zip(old_ids, tools, strict=True) if len(t.parameters) > 1}
        counts = _counts(trajectory, orderly)
        taken = {name for t in tools for name in (t.name, *(p.name for p in t.parameters))}
        names = iter(_made_up(rng, sum(1 + len(t.parameters) for t in tools), taken))
        renamed = []
        # By a tool's <|call|> and name: those of its new name, and its parameters' new places.
        changed: dict[bytes, tuple[np.ndarray, list[int]]] = {}
        for old, tool in zip(old_ids, tools, strict=True):
            order = list(range(len(tool.parameters)))
            if old in orderly and counts.get(old, set()) <= {len(order)}:
                order = rng.permutation(len(order)).tolist()
            name = next(names)
            parameters = tuple(Parameter(next(names), tool.parameters[at].type) for at in order)
            renamed.append(ToolSpec(name, tool.description, parameters))
            changed[old] = np.array([markers.call, *encode(name)], np.int32), order
        listed = [renamed[i] for i in rng.permutation(len(renamed)).tolist()]
        trajectory = with_offer(trajectory, listed, rest, self.tokenizer)
        order = []
        spans = list(trajectory.spans)
        for at, span in enumerate(spans):
            if span.role is Role.CALL and span.ids[0] == markers.call:
                ids, order = changed.get(span.ids.tobytes(), (span.ids, []))
                spans[at] = with_ids(span, ids)
            elif span.role is Role.ARGUMENTS and span.ids[0] == markers.arguments:
                spans[at] = _reordered(span, order, markers)
        return dataclasses.replace(trajectory, spans=spans)


def _counts(trajectory: Trajectory, orderly: Set[bytes]) -> dict[bytes, set[int]]:
    """How many arguments the calls of some tools have, -1 for a call that is cut off.

    A tool is named by the ids of <|call|> and its name.
    """
    counts: dict[bytes, set[int]] = {}
    following = [*trajectory.spans[1:], None]
    for span, arguments in zip(trajectory.spans, following, strict=True):
        if span.role is Role.CALL and (name := span.ids.tobytes()) in orderly:
            is_whole = (
                arguments is not None
                and arguments.role is Role.ARGUMENTS
                and arguments.ids[-1] == trajectory.markers.end
            )
            count = len(_values(arguments, trajectory.markers)) if is_whole and arguments else -1
            counts.setdefault(name, set()).add(count)
    return counts


def _values(arguments: Span, markers: Markers) -> list[list[int]]:
    """The ids of each argument; as the renderer writes them, [] where there is none."""
    ids = arguments.ids.tolist()  # a few: lists are quicker than arrays
    stop = len(ids) - int(ids[-1] == markers.end)
    if stop == 1:
        return []
    values, begin = [], 1
    for _ in range(ids.count(markers.sep)):
        end = ids.index(markers.sep, begin)
        values.append(ids[begin:end])
        begin = end + 1
    values.append(ids[begin:stop])
    return values if any(values) else values[1:]


def _reordered(arguments: Span, order: Sequence[int], markers: Markers) -> Span:
    if order == sorted(order):
        return arguments
    values = _values(arguments, markers)
    if not any(values):  # all alike
        return arguments
    ids = [markers.arguments, *values[order[0]]]
    for old in order[1:]:
        ids += [markers.sep, *values[old]]
    return with_ids(arguments, [*ids, markers.end])


def _made_up(rng: np.random.Generator, count: int, taken: Iterable[str]) -> list[str]:
    """Pronounceable names of two or three syllables, all different, and none of them taken."""
    made: dict[str, None] = {}
    excluded = set(taken)
    while len(made) < count:
        lengths = rng.integers(2, _MOST_SYLLABLES + 1, size=count).tolist()
        syllables = rng.integers(len(_SYLLABLES), size=(count, _MOST_SYLLABLES)).tolist()
        for length, own in zip(lengths, syllables, strict=True):
            name = "".join(_SYLLABLES[i] for i in own[:length])
            if name not in excluded:
                made[name] = None
    return list(made)[:count]
