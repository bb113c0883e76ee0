"""Scripted experts that really use the tools, and what they write down: recorded conversations.

`demonstrate` answers a library question. `instructed_session` follows spelled-out instructions over
a made-up corpus: what pretraining reads, so that calling, copying and retrying are learnt apart
from deciding what to call. Every observation comes from running the tool. An expert that slips
(forgets an argument, mistypes a path) reads the error and does it right the next time; a call that
timed out is tried again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from agentx.env.base import Task
from agentx.env.tasks.corpus import Corpus, Function, made_up, made_up_name
from agentx.env.tasks.library import (
    CALCULATE,
    LIST,
    NEW_TOOL,
    OPEN,
    SEARCH,
    TOOLS,
    LibraryEnv,
    Question,
)
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

# Other words for the same tools. None of them is in NEW_TOOL.
_OTHER_DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "search": ("find a function", "look a function up", "where is a function", "function index"),
    "open": ("show a line", "read a line of a file", "print a line", "line of a file"),
    "list": ("top functions of a file", "functions at the top", "top of a file", "outline"),
    "calculate": ("compute", "do sums", "arithmetic", "evaluate a sum"),
}


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A recorded conversation with the tools that were on offer."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    kind: str


class _Expert:
    """Makes calls, retries what timed out, now and then slips, and keeps the transcript."""

    def __init__(self, env: LibraryEnv, rng: np.random.Generator, slip_rate: float):
        self._env, self._rng, self._slip_rate = env, rng, slip_rate
        self._names = {role: name for name, role in env.roles.items()}
        self._parameters = {spec.name: spec.parameters for spec in env.tools}
        self.messages: list[Message] = []

    async def call(self, role: ToolSpec, *values: object) -> str:
        """The observation of the call once it works."""
        name = self._names[role.name]
        if self._rng.random() < self._slip_rate:
            _, failed = await self._try(name, self._mistyped(values))
            if not failed:  # it meant something else that is there too: nothing to learn from
                del self.messages[-2:]
        for _ in range(3):
            observation, failed = await self._try(name, values)
            if not failed:
                return observation
        raise AssertionError(f"{name}{values} failed three times: {observation}")

    def _mistyped(self, values: Sequence[object]) -> tuple[object, ...]:
        if len(values) > 1 and self._rng.random() < 0.5:
            return tuple(values[:-1])
        first = str(values[0])
        cut = int(self._rng.integers(1, len(first))) if len(first) > 1 else 0
        return (first[:cut], *values[1:])

    async def _try(self, name: str, values: Sequence[object]) -> tuple[str, bool]:
        names = [p.name for p in self._parameters[name]]
        call = ToolCall(name, dict(zip(names, values, strict=False)))
        before = bool(self.messages) and self.messages[-1].outcome is Outcome.FAILED
        observation = await self._env.step(Message("assistant", tool_calls=(call,)))
        reply = observation.messages[0]
        failed = reply.outcome is Outcome.FAILED
        good = Outcome.RECOVERED if before else Outcome.OK
        outcome = Outcome.FAILED if failed else good
        self.messages.append(Message("assistant", tool_calls=(call,), outcome=outcome))
        self.messages.append(reply)
        return reply.content, failed


async def demonstrate(
    question: Question, task: Task, env: LibraryEnv, rng: np.random.Generator, slip_rate: float
) -> Demonstration:
    """A library question answered in two calls, and as many more as failed."""
    expert = _Expert(env, rng, slip_rate)
    prompt = await env.reset(task)
    found = await expert.call(SEARCH, question.function.name)
    path, line = found.split("\n")
    if question.kind == "parameter":
        await expert.call(OPEN, path, int(line))
        answer = question.answer
    elif question.kind == "line_sum":
        answer = await expert.call(CALCULATE, f"{line}+{question.added}")
    else:
        answer = (await expert.call(LIST, path)).split("\n")[0]
    last = Message("assistant", answer)
    return Demonstration((*prompt, *expert.messages, last), env.tools, question.kind)


def _renamed_tools(rng: np.random.Generator, fragments: Sequence[str]) -> tuple[ToolSpec, ...]:
    """The four tools under invented names and other descriptions, never NEW_TOOL's."""
    specs = []
    taken = {NEW_TOOL.name}
    for spec in TOOLS:
        name = made_up_name(rng, fragments)
        while name in taken:
            name = made_up_name(rng, fragments)
        taken.add(name)
        descriptions = _OTHER_DESCRIPTIONS[spec.name]
        text = descriptions[rng.integers(len(descriptions))]
        parameters = tuple(Parameter(p.name, p.type) for p in spec.parameters)
        specs.append(ToolSpec(name, text, parameters))
    return tuple(specs)


def _instruction(step: str, function: Function, added: int) -> str:
    name, where = f"`{function.name}`", f"`{function.path}`"
    return {
        "search": f"search:{name}",
        "open": f"open:{where}:{function.line}",
        "list": f"list:{where}",
        "calculate": f"calculate:{function.line}+{added}",
        "search_open": f"search:{name} open",
        "search_list": f"search:{name} list",
        "search_calculate": f"search:{name} calculate +{added}",
    }[step]


_STEPS = (
    "search",
    "open",
    "list",
    "calculate",
    "search_open",
    "search_list",
    "search_calculate",
)


def repetition(
    rng: np.random.Generator, fragments: Sequence[str], num_names: int = 20, most: int = 4
) -> Demonstration:
    """Requests to repeat made-up names, and the answers: half of the tokens are copies.

    Copying is what small models learn last and what every call needs: it takes hold within some
    hundred steps of text as dense as this, and within thousands of tool sessions alone. A request
    holds one to `most` names, of `num_names` or a few more in all: in a short list there is less to
    take for what was meant, and copying comes sooner and for every seed (docs/log.md).
    """
    messages: list[Message] = []
    while num_names > 0:
        names = [made_up_name(rng, fragments) for _ in range(rng.integers(1, most + 1))]
        prompt = "repeat:" + ",".join(f"`{name}`" for name in names)
        messages += [Message("user", prompt), Message("assistant", "\n".join(names))]
        num_names -= len(names)
    return Demonstration(tuple(messages), (), "repetition")


async def instructed_session(
    rng: np.random.Generator,
    fragments: Sequence[str],
    *,
    corpus: Corpus | None = None,
    num_rounds: int = 2,
    rename_rate: float = 0.3,
    rate_cold: float = 0.15,
    slip_rate: float = 0.1,
) -> Demonstration:
    """Several instructed rounds of calls over one made-up corpus (or a given one).

    An instruction spells out what to do ("search:`f` open"). The answer is what the last call
    found: the path after a search, the first parameter after open, the first name after list, the
    sum.
    """
    corpus = corpus or made_up(rng, fragments)
    specs = _renamed_tools(rng, fragments) if rng.random() < rename_rate else TOOLS
    everything = [f for fs in corpus.functions.values() for f in fs if f.first_parameter]
    functions = [f for f in everything if len(corpus.find(f.name)) == 1]
    messages: list[Message] = []
    env = LibraryEnv(corpus, rate_cold, specs, max_calls=1000)
    for _ in range(num_rounds):
        function = functions[rng.integers(len(functions))]
        step = _STEPS[rng.integers(len(_STEPS))]
        added = int(rng.integers(2, 100))
        prompt = _instruction(step, function, added)
        await env.reset(Task("", prompt, "", seed=int(rng.integers(2**62))))
        expert = _Expert(env, rng, slip_rate)
        path, line = function.path, function.line
        if step.startswith("search"):
            path, text = (await expert.call(SEARCH, function.name)).split("\n")
            line = int(text)
        answer = path
        if step.endswith("open"):
            await expert.call(OPEN, path, line)
            answer = function.first_parameter
        elif step.endswith("list"):
            answer = (await expert.call(LIST, path)).split("\n")[0]
        elif step.endswith("calculate"):
            answer = await expert.call(CALCULATE, f"{line}+{added}")
        messages += [Message("user", prompt), *expert.messages, Message("assistant", answer)]
    return Demonstration(tuple(messages), specs, "instructed")
