"""A span filter: failed runs stay, and their harmful steps get no loss."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from agentx.data.curate.base import Document, Taken
from agentx.data.formats import Conversation, TextDocument
from agentx.trajectory import Message, Outcome


@dataclasses.dataclass(frozen=True)
class GoodSteps:
    """Marks the harmful steps of failed runs as FAILED, so that the good ones of them are trained.

    Exploring Expert Failures (arXiv:2504.13145) trains the good actions of runs that failed and
    masks the harmful ones. It finds out which are which by playing on from them; here what the file
    tells has to do. A run has failed where its reward is under `threshold`, and a step of it, a
    message of the assistant, is harmful where

        its outcome is FAILED already, or one of its results reports a failure: the tool or the
        environment refused it;
        all its calls were made before, word for word, and had the same results: it goes in circles;
        it is the last thing that the assistant says, an answer, and the reward is 0 or less.

    Everything else is good. The first good call after a harmful one is RECOVERED. The objectives'
    factor for failed steps (`NextToken.failed`, 0 unless bound) does the masking. A failed run
    without a good step is taken, and so is one with a message that could not be read, for no format
    can write it. Texts, runs that succeeded and those without a reward pass as they
    are. GoodSteps(threshold=1.0) on a run of reward 0:

        user       Which file has walk?    ok
        assistant  find(name=wlk)          failed       its result is a failure
        tool       error: no such name     failed
        assistant  find(name=walk)         recovered
        tool       os.py                   ok
        assistant  list(path=os)           ok
        tool       os.py path.py           ok
        assistant  list(path=os)           failed       the same call, the same result
        tool       os.py path.py           ok
        assistant  open(path=os.py)        recovered
        tool       def walk(top):          ok
        assistant  path.py                 failed       the answer of a run of reward 0
    """

    threshold: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"GoodSteps.threshold is {self.threshold}; it must be finite")

    def __call__(self, document: Document) -> Document | Taken:
        if isinstance(document, TextDocument):
            return document
        reward = document.reward
        if reward is None or reward >= self.threshold:
            return document
        for number, message in enumerate(document.messages):
            if message.malformed:
                return Taken("a malformed message", (f"message {number}",))
        messages = _marked(document.messages, is_worthless=reward <= 0)
        if all(m.outcome is Outcome.FAILED for m in messages if m.role == "assistant"):
            return Taken("no good step")
        return _with_messages(document, messages)


class _Step(NamedTuple):
    """A message of the assistant and the results of its calls, by their places."""

    at: int
    results: range


def _marked(messages: Sequence[Message], *, is_worthless: bool) -> list[Message]:
    marked = list(messages)
    seen: set[str] = set()
    after_failure = False
    steps = _steps(messages)
    for step in steps:
        message = messages[step.at]
        results = messages[step.results.start : step.results.stop]
        made = [
            json.dumps([call.name, call.arguments, result.content], sort_keys=True)
            for call, result in zip(message.tool_calls, results, strict=False)
        ]
        again = [each in seen for each in made]
        seen.update(made)
        is_circle = bool(message.tool_calls) and len(again) == len(message.tool_calls)
        is_circle = is_circle and all(again)
        is_last = step is steps[-1] and not message.tool_calls
        if (
            message.outcome is Outcome.FAILED
            or any(result.outcome is Outcome.FAILED for result in results)
            or is_circle
            or (is_worthless and is_last)
        ):
            marked[step.at] = dataclasses.replace(message, outcome=Outcome.FAILED)
            after_failure = True
            if is_circle and len(results) > 1:
                # Calls that are made together are told apart by their results.
                for at in step.results:
                    marked[at] = dataclasses.replace(messages[at], outcome=Outcome.FAILED)
        elif message.tool_calls:
            if after_failure:
                marked[step.at] = dataclasses.replace(message, outcome=Outcome.RECOVERED)
            after_failure = False
    return marked


def _steps(messages: Sequence[Message]) -> list[_Step]:
    steps = []
    for at, message in enumerate(messages):
        if message.role == "assistant":
            stop = at + 1
            while stop < len(messages) and messages[stop].role == "tool":
                stop += 1
            steps.append(_Step(at, range(at + 1, stop)))
    return steps


def _with_messages(conversation: Conversation, messages: Sequence[Message]) -> Conversation:
    """The same conversation where nothing changed, so that it does not count as changed."""
    told = tuple(messages)
    if told == conversation.messages:
        return conversation
    return dataclasses.replace(conversation, messages=told)
