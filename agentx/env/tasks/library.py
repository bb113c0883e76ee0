"""Questions about source code that take two dependent tool calls: the quickstart's tasks.

Four tools read a `Corpus`: search, open, list, calculate. A question names a function; the second
call needs what the first one found:

    parameter    search f -> path, line;  open path line -> signature;   answer its first parameter
    line_sum     search f -> path, line;  calculate line + k -> sum;     answer the sum
    neighbour    search f -> path, line;  list path -> names;            answer the first name

Calls fail for real reasons: a path that is not there, an argument that is missing or no number, and
a tool that runs out of time. Time is counted in ticks of work, not in seconds, so that an episode
can be repeated exactly: a call may take `_TICKS` of them, and a tool whose index is cold has
`_LOADING` to do before its first answer. What a call that timed out has loaded stays loaded, so the
same call again succeeds. Which tools are cold is drawn from the task's seed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import numpy as np

from agentx.env.base import Rubric, Task
from agentx.env.tasks.corpus import Corpus, Function, Split, standard_library
from agentx.env.tools import Tool, ToolEnv, ToolError
from agentx.trajectory import Message, Parameter, ToolSpec

Kind = Literal["parameter", "line_sum", "neighbour"]
KINDS: tuple[Kind, ...] = ("parameter", "line_sum", "neighbour")
TIMED_OUT = "error: timed out"

# Ticks that one call may take, that loading a cold index takes, and that the answer itself takes.
_TICKS, _LOADING, _ANSWERING = 100, 150, 10

_NUM_LISTED = 3
_LONGEST_NAME, _LONGEST_PATH, _LONGEST_SIGNATURE = 24, 28, 60
_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
_SUM = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*")

SEARCH = ToolSpec("search", "find a function", (Parameter("name"),))
OPEN = ToolSpec("open", "show a line", (Parameter("path"), Parameter("line", "integer")))
LIST = ToolSpec("list", "top functions of a file", (Parameter("path"),))
CALCULATE = ToolSpec("calculate", "compute", (Parameter("sum"),))
TOOLS = (SEARCH, OPEN, LIST, CALCULATE)

# Nowhere in the training data, neither as a tool nor as a word: what the new-tool evaluation offers
# in place of search.
NEW_TOOL = ToolSpec(
    "pinpoint", "tells the file and line where a name is defined", SEARCH.parameters
)


class LibraryEnv(ToolEnv):
    """One question to one corpus. `specs` name the four tools, in the order of TOOLS."""

    def __init__(
        self,
        corpus: Corpus,
        rate_cold: float,
        specs: Sequence[ToolSpec] = TOOLS,
        *,
        max_calls: int = 5,
        tool_timeout_s: float = 10.0,
    ):
        self._corpus = corpus
        self._rate_cold = rate_cold
        # What each tool still has to load, in ticks.
        self._to_load = [0] * len(TOOLS)
        runs: tuple[Callable[..., str], ...] = (
            self._search,
            self._open,
            self._list,
            self._calculate,
        )
        self.roles = {spec.name: role.name for spec, role in zip(specs, TOOLS, strict=True)}
        tools = [
            Tool(spec, self._timed(number, spec, run))
            for number, (spec, run) in enumerate(zip(specs, runs, strict=True))
        ]
        rubric = Rubric(exact_answer=(1.0, exact_answer))
        super().__init__(tools, rubric, max_calls=max_calls, tool_timeout_s=tool_timeout_s)

    async def reset(self, task: Task) -> list[Message]:
        rng = np.random.Generator(np.random.Philox(key=task.seed))
        self._to_load = [_LOADING if rng.random() < self._rate_cold else 0 for _ in TOOLS]
        return await super().reset(task)

    def _timed(
        self, number: int, spec: ToolSpec, run: Callable[..., str]
    ) -> Callable[..., Awaitable[str]]:
        async def timed(**arguments: object) -> str:
            loaded = min(self._to_load[number], _TICKS)
            self._to_load[number] -= loaded
            if loaded + _ANSWERING > _TICKS:
                raise ToolError(TIMED_OUT)
            return run(*(arguments[p.name] for p in spec.parameters))

        return timed

    def _search(self, name: str) -> str:
        found = self._corpus.find(name)
        if not found:
            raise ToolError("error: no such function")
        return f"{found[0].path}\n{found[0].line}"

    def _open(self, path: str, line: int) -> str:
        lines = self._lines(path)
        if not 1 <= line <= len(lines):
            raise ToolError(f"error: no such line, {len(lines)} in all")
        return lines[line - 1].strip()

    def _list(self, path: str) -> str:
        self._lines(path)
        names = [f.name for f in self._corpus.functions[path][:_NUM_LISTED]]
        return "\n".join(names) if names else "no functions"

    def _lines(self, path: str) -> Sequence[str]:
        if path not in self._corpus.files:
            raise ToolError("error: no such file")
        return self._corpus.files[path]

    @staticmethod
    def _calculate(sum: str) -> str:
        match = _SUM.fullmatch(sum)
        if match is None:
            raise ToolError("error: not a sum")
        left, sign, right = match.groups()
        return str(_OPERATORS[sign](int(left), int(right)))


def exact_answer(task: Task, messages: Sequence[Message]) -> float:
    """1 if the last message is an answer and is the task's, else 0."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls or last.malformed:
        return 0.0
    return float(last.content.strip() == task.answer)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question before its episode is drawn. `added` is the k of a line_sum."""

    kind: Kind
    function: Function
    answer: str
    added: int = 0


def question_text(question: Question, phrasing: int) -> str:
    """The prompt. Names stand in backquotes, so that they are encoded as they are elsewhere."""
    name = f"`{question.function.name}`"
    texts = {
        "parameter": (f"What does {name} take first?", f"Which argument does {name} take first?"),
        "line_sum": (
            f"Line of {name} plus:{question.added}",
            f"Add to the line of {name}:{question.added}",
        ),
        "neighbour": (f"Who is first in the file of {name}?", f"Top function beside {name}?"),
    }[question.kind]
    return texts[phrasing % len(texts)]


def questions_of(corpus: Corpus, rng: np.random.Generator) -> list[Question]:
    """Every question that a corpus gives: of functions defined once, on one short line."""
    found: list[Question] = []
    for path, functions in corpus.functions.items():
        names = [f.name for f in functions[:_NUM_LISTED]]
        fits = len(path) <= _LONGEST_PATH
        short = all(len(n) <= _LONGEST_NAME for n in names)
        for function in functions:
            once = len(corpus.find(function.name)) == 1
            if not (fits and once and len(function.name) <= _LONGEST_NAME):
                continue
            if function.name.startswith("__"):
                continue
            if function.first_parameter and len(function.signature) <= _LONGEST_SIGNATURE:
                found.append(Question("parameter", function, function.first_parameter))
            added = int(rng.integers(2, 100))
            found.append(Question("line_sum", function, str(function.line + added), added))
            if short and len(names) == _NUM_LISTED and function.name != names[0]:
                found.append(Question("neighbour", function, names[0]))
    return found


def _at_most(questions: list[Question], share: float, rng: np.random.Generator) -> list[Question]:
    """Drops questions at random until no answer is more than `share` of all, kinds being equal."""
    order = rng.permutation(len(questions))
    per_kind = min(Counter(q.kind for q in questions).values())
    limit = max(1, int(share * per_kind))
    kept: list[Question] = []
    answers: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    for index in order:
        question = questions[index]
        key = (question.kind, question.answer)
        if answers[key] < limit and kinds[question.kind] < per_kind:
            answers[key] += 1
            kinds[question.kind] += 1
            kept.append(question)
    return kept


@functools.cache
def _library_questions(split: Split, seed: int) -> tuple[Corpus, tuple[Question, ...]]:
    corpus = standard_library(split)
    rng = np.random.Generator(np.random.Philox(key=seed))
    questions = questions_of(corpus, rng)
    if split != "train":
        known = standard_library("train").words()
        questions = [q for q in questions if q.function.name not in known]
    return corpus, tuple(_at_most(questions, 0.05, rng))


@dataclasses.dataclass(frozen=True)
class LibraryTasks:
    """Questions about the standard library's files of one split.

    Files are split by their path. The function that a dev or held-out question asks about occurs
    nowhere in the training files, neither as a definition nor as any other word. `rate_cold` is the
    chance of each tool to begin cold, and so to time out at its first call. With `new_tool`, the
    first tool goes by a name and a description that no training prompt has.
    """

    split: Split = "train"
    rate_cold: float = 0.15
    max_calls: int = 5
    new_tool: bool = False

    def __len__(self) -> int:
        return len(_library_questions(self.split, 0)[1])

    def task(self, index: int, seed: int = 0) -> Task:
        """Question `index` (it wraps round), in the world that `seed` draws."""
        questions = _library_questions(self.split, 0)[1]
        question = questions[index % len(questions)]
        return Task(
            id=f"library/{self.split}/{index % len(questions)}",
            prompt=question_text(question, index),
            answer=question.answer,
            kind=question.kind,
            seed=seed,
        )

    def env(self) -> LibraryEnv:
        corpus = _library_questions(self.split, 0)[0]
        specs = (NEW_TOOL, *TOOLS[1:]) if self.new_tool else TOOLS
        return LibraryEnv(corpus, self.rate_cold, specs, max_calls=self.max_calls)

    def question(self, index: int) -> Question:
        """What `task(index)` asks, for the expert that demonstrates it."""
        questions = _library_questions(self.split, 0)[1]
        return questions[index % len(questions)]
