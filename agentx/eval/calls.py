"""Calls one by one: is what a policy calls, after what an expert saw, what the expert called?

    questions -> the expert's conversations -> places: what stood before a call, and the call
    policy -> one greedy turn a place -> right where it is that call, name and arguments

An episode is won or lost as a whole, so a weak policy scores 0 whatever it can do. A place asks for
a single call, and so tells weak policies apart. The turn is sampled and parsed as in an episode: a
call that it takes back by <|back|> is none, and what follows counts.

The expert's calls that failed are no places: a slip is nothing to imitate. They, and what came of
them, stand before the calls that recovered.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from agentx.env.tasks.corpus import Split
from agentx.env.tasks.expert import Demonstration, demonstrate
from agentx.env.tasks.library import NEW_TOOL, LibraryTasks
from agentx.eval.scores import Score, make_score
from agentx.render import ToolRenderer
from agentx.sample.engine import Engine
from agentx.sample.sampling import check_seed
from agentx.trajectory import Message, Outcome, ToolCall, ToolSpec


@dataclasses.dataclass(frozen=True)
class LibraryCalls:
    """Which calls are asked for: those of an expert on `num_questions` questions of a split.

    rate_cold, slip_rate: how often a tool times out and the expert slips, which makes calls that
    recover. num_slots: of the sampler. seed: of the choice of questions and of all that goes wrong.
    """

    split: Split = "held_out"
    num_questions: int = 256
    rate_cold: float = 0.15
    slip_rate: float = 0.1
    max_new_tokens: int = 32
    num_slots: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_questions", "max_new_tokens", "num_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        check_seed("LibraryCalls.seed", self.seed)


@dataclasses.dataclass(frozen=True)
class Place:
    """What stood before a call, the tools on offer, and the call."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    call: ToolCall
    outcome: Outcome


def library_places(config: LibraryCalls, *, new_tool: bool) -> list[Place]:
    """The calls of the expert that worked, in order; with `new_tool`, a tool in search's place.

    Raises ValueError where the split has fewer questions than are asked for.
    """
    tasks = LibraryTasks(config.split, rate_cold=config.rate_cold, new_tool=new_tool)
    if config.num_questions > len(tasks):
        raise ValueError(
            f"num_questions is {config.num_questions} but the {config.split} split has "
            f"{len(tasks)}: ask for at most {len(tasks)}"
        )

    async def conversations() -> list[Demonstration]:
        rng = np.random.Generator(np.random.Philox(key=config.seed))
        return [
            await demonstrate(
                tasks.question(int(i)),
                tasks.task(int(i), seed=int(rng.integers(2**62))),
                tasks.env(),
                rng,
                config.slip_rate,
            )
            for i in rng.permutation(len(tasks))[: config.num_questions]
        ]

    return [
        Place(conversation.messages[:at], conversation.tools, call, message.outcome)
        for conversation in asyncio.run(conversations())
        for at, message in enumerate(conversation.messages)
        for call in message.tool_calls
        if message.outcome is not Outcome.FAILED
    ]


class CallSuite:
    """The places of a `LibraryCalls`, rendered once for any number of policies.

    call      of all calls, those made as the expert made them
    recovery  the same of calls that came after a failed one
    new_tool  the same of calls of a tool that goes by a name and a description that no training
              prompt has
    A score of no places, as recovery is where nothing goes wrong, is left out.
    """

    def __init__(self, config: LibraryCalls, renderer: ToolRenderer):
        self._config, self._renderer = config, renderer
        known = library_places(config, new_tool=False)
        new = library_places(config, new_tool=True)
        new = [p for p in new if p.call.name == NEW_TOOL.name]
        asked = {
            "call": known,
            "recovery": [p for p in known if p.outcome is Outcome.RECOVERED],
            "new_tool": new,
        }
        self._asked = {name: places for name, places in asked.items() if places}
        self._places = [*known, *new]
        self._prompts = {id(p): self._prompt(p) for p in self._places}

    @property
    def max_length(self) -> int:
        """What an engine's max_length must be, at the least."""
        return max(map(len, self._prompts.values())) + self._config.max_new_tokens

    def score(self, engine: Engine) -> dict[str, Score]:
        """The scores of the policy that the engine holds, whose temperature must be 0."""
        turns = engine.complete(
            [self._prompts[id(p)] for p in self._places],
            [self._config.max_new_tokens] * len(self._places),
        )
        right = {
            id(place): self._renderer.parse(turn.ids, place.tools).tool_calls == (place.call,)
            for place, turn in zip(self._places, turns, strict=True)
        }
        return {
            name: make_score(name, sum(right[id(p)] for p in asked), len(asked))
            for name, asked in self._asked.items()
        }

    def _prompt(self, place: Place) -> Sequence[int]:
        spans = self._renderer.render(place.messages, place.tools)
        return [int(i) for span in spans for i in span.ids]
