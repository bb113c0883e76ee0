"""The choice of a tool, among those offered and others put beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from agentx.data.objectives.base import (
    OFFER,
    Example,
    Objective,
    check_share,
    check_steady,
    random_generator,
)
from agentx.data.objectives.calls import load_tokenizer, spread
from agentx.data.objectives.offer import field_encoder, parse_offer, read_offer, with_offer
from agentx.data.objectives.weights import NextToken
from agentx.data.store import TokenStore
from agentx.render import tool_list
from agentx.trajectory import Markers, Role, ToolSpec, Trajectory

Encode = Callable[[str], list[int]]

_NEXT_TOKEN = NextToken()


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Scores each call among the tools offered, and puts tools of other documents beside them.

    The loss of a name holds two things: which tool it is, where the names of the tools offered
    part, and its spelling, where only one of them is left. The first alone is the choice, so it has
    a weight of its own. Its loss is that of a softmax over the tools that are left, and of what the
    model gives to anything that is no tool on offer. So every call is scored in the place where it
    is made, and a document is not copied for each candidate. Of this document

        <|bos|> <|system|> find_file(): files <|user|> go <|call|> find_file <|arguments|> <|end|>

    comes, with `find_line` put in and the default weights:

        token    <|bos|> <|system|>   find  _line      (      )      :  lines     \\n
        role      system     system system system system system system system system
        weight         0          0      0      0      0      0      0      0      0

        token      find  _file      (      )      :  files
        role     system system system system system system
        weight        0      0      0      0      0      0

        token    <|user|>   go <|call|> find _file <|arguments|>   <|end|>
        role         user user     call call  call     arguments arguments
        weight          0    0        1    1     4             1         1

    Of `find` and `find_file` the second would be chosen at its second token, and the first at the
    <|arguments|> that ends it.

    tokenizer: the file of the one that the store, and the pool, were built with.
    pool: the token store whose documents' tools are put in, each different one as often as another;
      of a large one, the tools of 1024 documents.
    rate: the probability that a document that lists tools is changed and scored so; the others are
      left to `base`, which sets the weights that are then multiplied.
    distractors: how many tools are drawn; one whose name is on offer already is not put in.
    choice, rest: multiply the weights of the tokens that choose, and of all others. With rest 0
      only the choice is trained. <|call|> is of the rest: it chooses to call at all.
    longest: no tool whose line in the list takes more tokens is put in.
    base: what is done with the document then. `ToolRename`, for instance, renames what was put in
      too, so that a name does not give away that it comes from elsewhere.
    A call of a tool that is not offered chooses nothing, and neither does one where a single tool
    is. A document whose piece at hand lacks the list is left to `base`.
    """

    tokenizer: str
    pool: str = ""
    rate: float = 0.5
    distractors: int = 4
    choice: float = 4.0
    rest: float = 1.0
    longest: int = 64
    base: Objective = _NEXT_TOKEN

    def __post_init__(self) -> None:
        check_steady("ToolChoice.base", [self.base])
        check_share("ToolChoice.rate", self.rate)
        if self.distractors < 0:
            raise ValueError(f"ToolChoice.distractors is {self.distractors}; it must be 0 or more")
        if self.distractors and not self.pool:
            raise ValueError(
                f"ToolChoice.distractors is {self.distractors}, but there is no pool to draw them "
                "from: name a store, or set it to 0"
            )
        if min(self.choice, self.rest) < 0:
            raise ValueError(
                f"ToolChoice.choice and rest must be 0 or more, got {self.choice} and {self.rest}"
            )

    def room(self, trajectory: Trajectory) -> int:
        """That of `base`, and the tokens of the longest tools that may be put in."""
        room = self.base.room(trajectory)
        offers = self.rate > 0 and read_offer(trajectory, self.tokenizer).tools
        return room + self._places if offers else room

    def __call__(self, trajectory: Trajectory, seed: int, epoch: int, index: int) -> Example:
        rng = random_generator(seed, epoch, index, OFFER)
        tools, rest = read_offer(trajectory, self.tokenizer)
        if rng.random() >= self.rate or not tools:
            return self.base(trajectory, seed, epoch, index)
        listed: Sequence[ToolSpec] = self._with_distractors(tools, rng)
        offered = with_offer(trajectory, listed, rest, self.tokenizer)
        example = self.base(offered, seed, epoch, index)
        most = len(trajectory) + self._places
        # What `base` makes of more tools may take more room than what it reserved for fewer.
        if len(example) > most and len(example) > most + self.base.room(trajectory):
            example = self.base(trajectory, seed, epoch, index)
        weights = example.weights * np.float32(self.rest)
        encode = field_encoder(self.tokenizer).encode
        # `base` may have changed the tools again, and as a rule has not.
        system = offered.spans[0].ids
        if not np.array_equal(example.ids[: len(system)], system):
            listed = _listed(example, trajectory.markers, self.tokenizer)
        chosen = _choosing(example, listed, trajectory.markers, encode)
        weights[chosen] = example.weights[chosen] * np.float32(self.choice)
        return dataclasses.replace(example, weights=weights)

    @property
    def _places(self) -> int:
        if not self.distractors:
            return 0
        return _most_tokens(self.pool, self.tokenizer, self.longest, self.distractors)

    def _with_distractors(
        self, tools: Sequence[ToolSpec], rng: np.random.Generator
    ) -> list[ToolSpec]:
        """The tools, with others in random places among them."""
        listed, taken = list(tools), {tool.name for tool in tools}
        if not self.distractors:
            return listed
        others, _ = _tools_of(self.pool, self.tokenizer, self.longest)
        for drawn in rng.integers(len(others), size=self.distractors).tolist():
            if others[drawn].name not in taken:
                taken.add(others[drawn].name)
                listed.insert(int(rng.integers(len(listed) + 1)), others[drawn])
        return listed


@functools.lru_cache(maxsize=8)
def _tools_of(
    pool: str, tokenizer: str, longest: int
) -> tuple[tuple[ToolSpec, ...], tuple[int, ...]]:
    """The different tools that a pool's documents list, and the tokens that each adds to a list."""
    store = TokenStore.open(pool, load_tokenizer(tokenizer).fingerprint)
    tokens: dict[ToolSpec, int] = {}
    encode = field_encoder(tokenizer).encode
    for document in spread(store):
        first = store.piece(document, 0, int(store.span_ends(document)[0]))
        for tool in read_offer(first, tokenizer).tools:
            if tool not in tokens:
                tokens[tool] = len(encode("\n" + tool_list([tool])))
    short = {tool: count for tool, count in tokens.items() if count <= longest}
    if not short:
        raise ValueError(
            f"{pool} lists no tool of at most {longest} tokens for ToolChoice to put in"
        )
    return tuple(short), tuple(short.values())


@functools.lru_cache(maxsize=8)
def _most_tokens(pool: str, tokenizer: str, longest: int, count: int) -> int:
    """The tokens of the longest tools of a pool, so many of them."""
    return sum(sorted(_tools_of(pool, tokenizer, longest)[1])[-count:])


def _listed(example: Example, ids_of: Markers, tokenizer: str) -> Sequence[ToolSpec]:
    """The tools that an example lists."""
    stop = int(np.argmin(example.roles == Role.SYSTEM))
    opened = np.flatnonzero(example.ids[:stop] == ids_of.system)
    return parse_offer(example.ids[opened[0] + 1 : stop], tokenizer).tools if len(opened) else ()


def _choosing(
    example: Example, tools: Sequence[ToolSpec], ids_of: Markers, encode: Encode
) -> list[int]:
    """The tokens of an example at which a call chooses between the tools."""
    # A marker ends each name, so that none is the beginning of another.
    names = {(*encode(tool.name), ids_of.arguments) for tool in tools}
    stops = np.flatnonzero(example.ids == ids_of.arguments) + 1
    calls = np.flatnonzero(example.ids == ids_of.call) + 1
    partings: dict[tuple[int, ...], set[int]] = {}
    places: list[int] = []
    for start, at in zip(calls.tolist(), stops.searchsorted(calls).tolist(), strict=True):
        name = tuple(example.ids[start : stops[at]].tolist()) if at < len(stops) else ()
        if name in names and name not in partings:
            partings[name] = {_parting(name, other) for other in names if other != name}
        places += (start + place for place in partings.get(name, ()))
    return places


def _parting(name: Sequence[int], other: Sequence[int]) -> int:
    """Where two names cease to be the same."""
    return next(at for at, (a, b) in enumerate(zip(name, other, strict=False)) if a != b)
