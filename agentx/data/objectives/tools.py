"""Other names for the tools on offer, so that tools are learnt from what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from agentx.data.objectives.base import CHOOSE, Example, Objective, random_generator
from agentx.data.objectives.calls import (
    ARGUMENTS,
    BOS,
    CALL,
    END,
    SEP,
    SYSTEM,
    load_tokenizer,
)
from agentx.data.objectives.weights import NextToken
from agentx.render import parse_tool_list, tool_list
from agentx.trajectory import Parameter, Role, Span, ToolSpec, Trajectory

_NEXT_TOKEN = NextToken()

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = 3
# The most tokens that a new name may take: its bytes, and a space before it.
_LONGEST = 2 * _SYLLABLES + 1


@dataclasses.dataclass(frozen=True)
class ToolRename:
    """Gives the tools of a document made-up names, and lists them and their parameters anew.

    A name that says nothing leaves the description to choose by. Within a document a tool has one
    name, in the list and in every call; arguments follow their parameters. Another objective then
    does what it does. Of this document, in the tool format:

        find(name, line): find a function      <|call|>find<|arguments|>walk<|sep|>7<|end|>
        list(path): list a folder

    comes, for instance,

        sago(kenu): list a folder              <|call|>dibo<|arguments|>7<|sep|>walk<|end|>
        dibo(fela, ruvi): find a function

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
        if not 0 <= self.rate <= 1:
            raise ValueError(f"ToolRename.rate is {self.rate}; it must be in [0, 1]")

    def room(self, trajectory: Trajectory) -> int:
        """That of `base`, and a longest name for each tool, each parameter and each call."""
        room = self.base.room(trajectory)
        if not self.rate:
            return room
        tools, _ = self._tools(trajectory)
        num_calls = sum(span.role is Role.CALL for span in trajectory.spans) if tools else 0
        return room + _LONGEST * (num_calls + sum(1 + len(t.parameters) for t in tools))

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        rng = random_generator(seed, epoch, index, CHOOSE)
        if rng.random() < self.rate:
            trajectory = self._renamed(trajectory, rng)
        return self.base(trajectory, seed, epoch, index)

    def _tools(self, trajectory: Trajectory) -> tuple[list[ToolSpec], str]:
        """The tools that the document lists, and what its system span says after them."""
        ids = trajectory.spans[0].ids.tolist()
        if trajectory.spans[0].role is not Role.SYSTEM or ids[:2] != [BOS, SYSTEM]:
            return [], ""
        return parse_tool_list(load_tokenizer(self.tokenizer).decode(ids[2:]))

    def _renamed(self, trajectory: Trajectory, rng: np.random.Generator) -> Trajectory:
        tools, rest = self._tools(trajectory)
        if not tools:
            return trajectory
        encode = load_tokenizer(self.tokenizer).encode
        taken = {name for t in tools for name in (t.name, *(p.name for p in t.parameters))}
        changed: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        renamed = []
        for tool in tools:
            name_ids = tuple(encode(tool.name))
            order = list(range(len(tool.parameters)))
            if _gives_all(trajectory, name_ids, len(order)):
                order = rng.permutation(len(order)).tolist()
            names = [_made_up(rng, taken) for _ in range(1 + len(order))]
            parameters = tuple(
                Parameter(names[1 + at], tool.parameters[old].type) for at, old in enumerate(order)
            )
            renamed.append(ToolSpec(names[0], tool.description, parameters))
            changed[name_ids] = encode(names[0]), order
        listed = tool_list([renamed[i] for i in rng.permutation(len(renamed))])
        system = trajectory.spans[0]
        text = "\n".join(part for part in (listed, rest) if part)
        spans = [_with_ids(system, [BOS, SYSTEM, *encode(text)])]
        order = []
        for span in trajectory.spans[1:]:
            if span.role is Role.CALL and span.ids[0] == CALL:
                old = tuple(span.ids[1:].tolist())
                name, order = changed.get(old, (list(old), []))
                span = _with_ids(span, [CALL, *name])
            elif span.role is Role.ARGUMENTS and span.ids[0] == ARGUMENTS:
                span = _reordered(span, order)
            spans.append(span)
        return dataclasses.replace(trajectory, spans=spans)


def _gives_all(trajectory: Trajectory, name_ids: Sequence[int], count: int) -> bool:
    """Whether every call of a tool is whole and has an argument for each of its parameters."""
    following = [*trajectory.spans[1:], None]
    for span, arguments in zip(trajectory.spans, following, strict=True):
        if span.role is Role.CALL and tuple(span.ids[1:].tolist()) == tuple(name_ids):
            if arguments is None or arguments.role is not Role.ARGUMENTS:
                return False
            if arguments.ids[-1] != END or len(_values(arguments)) != count:
                return False
    return True


def _values(arguments: Span) -> list[list[int]]:
    """The ids of each argument; as the renderer writes them, [] where there is none."""
    body = arguments.ids[1:].tolist()
    body = body[: -1 if body[-1:] == [END] else None]
    if not body:
        return []
    values: list[list[int]] = [[]]
    for token in body:
        if token == SEP:
            values.append([])
        else:
            values[-1].append(token)
    return values if any(values) else values[1:]


def _reordered(arguments: Span, order: Sequence[int]) -> Span:
    if order == sorted(order):
        return arguments
    values = _values(arguments)
    if not any(values):  # all alike
        return arguments
    ids = [ARGUMENTS, *values[order[0]]]
    for old in order[1:]:
        ids += [SEP, *values[old]]
    return _with_ids(arguments, [*ids, END])


def _with_ids(span: Span, ids: Sequence[int]) -> Span:
    return Span(span.role, np.array(ids, np.int32), span.origin, span.outcome)


def _made_up(rng: np.random.Generator, taken: set[str]) -> str:
    """A pronounceable name of two or three syllables that is not taken; it then is."""
    while True:
        count = int(rng.integers(2, _SYLLABLES + 1))
        name = "".join(
            letters[int(rng.integers(len(letters)))]
            for _ in range(count)
            for letters in (_CONSONANTS, _VOWELS)
        )
        if name not in taken:
            taken.add(name)
            return name
