"""Stand-ins that several tests share: an environment that echoes, and a policy with a script."""

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from agentx.env.base import CallRecord, Observation, Task
from agentx.render import ToolRenderer
from agentx.sample.engine import Turn
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Message, Outcome, Parameter, ToolCall, ToolSpec

SAY = ToolSpec("say", "repeats a text", (Parameter("text"),))


def say(text: str) -> Message:
    return Message("assistant", tool_calls=(ToolCall("say", {"text": text}),))


class EchoEnv:
    """Repeats the text of every call, fails what is malformed, and ends at an answer.

    It ends at turn `num_turns` at the latest. The reward is 1 for the task's answer, else 0. At
    turn `crash_at` (0 is `reset`) it raises; at turn `hang_at` it never comes back.
    """

    tools = (SAY,)

    def __init__(self, num_turns: int = 3, crash_at: int = -1, hang_at: int = -1):
        self.calls: list[CallRecord] = []
        self._num_turns, self._crash_at, self._hang_at = num_turns, crash_at, hang_at
        self._turn = 0

    async def reset(self, task: Task) -> list[Message]:
        self._task, self._turn, self.calls = task, 0, []
        await self._misbehave()
        return [Message("user", task.prompt)]

    async def step(self, message: Message) -> Observation:
        self._turn += 1
        await self._misbehave()
        if not message.malformed and not message.tool_calls:
            right = message.content == self._task.answer
            return Observation((), float(right), done=True, info={"rewards": {"right": right}})
        failed = bool(message.malformed)
        text = message.malformed or str(message.tool_calls[0].arguments.get("text"))
        self.calls.append(CallRecord("say", {"text": text}, text, not failed, failed))
        reply = Message("tool", text, outcome=Outcome.FAILED if failed else Outcome.OK)
        return Observation((reply,), done=self._turn >= self._num_turns)

    async def _misbehave(self) -> None:
        if self._turn == self._crash_at:
            raise RuntimeError("the world ended")
        if self._turn == self._hang_at:
            await asyncio.sleep(3600)


class EchoTasks:
    """`size` tasks that ask to say their number."""

    def __init__(self, size: int = 10):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def task(self, index: int, seed: int = 0) -> Task:
        return Task(f"echo/{index}", f"Say {index}.", str(index), kind="echo", seed=seed)

    def env(self) -> EchoEnv:
        return EchoEnv()


@dataclasses.dataclass
class ScriptedSession:
    request_id: int
    length: int
    experts: None = None


class ScriptedEngine:
    """Stands for an `Engine` whose policy says the given messages, turn by turn, in every session.

    `fed` has, by request, the ids that each turn was given to read; `prompts` those of each group.
    A turn that would pass max_length is cut there, with the reason "context".
    """

    def __init__(self, script: Sequence[Message | Sequence[int]], max_length: int = 1000):
        self.max_length = max_length
        self.prompts: list[list[int]] = []
        self.fed: dict[int, list[list[int]]] = {}
        self.num_open = 0
        self._script = script
        self._renderer = ToolRenderer(Tokenizer.bytes())

    async def open_group(self, prompt_ids, request_ids) -> list[ScriptedSession]:
        self.prompts.append([int(i) for i in prompt_ids])
        self.num_open += len(request_ids)
        self.fed.update({request: [] for request in request_ids})
        return [ScriptedSession(request, len(prompt_ids)) for request in request_ids]

    async def generate(self, session: ScriptedSession, new_ids, max_new_tokens: int) -> Turn:
        await asyncio.sleep(0)
        turns = self.fed[session.request_id]
        said = self._script[len(turns) % len(self._script)]
        turns.append([int(i) for i in new_ids])
        session.length += len(new_ids)
        if isinstance(said, Message):
            spans = self._renderer.render([Message("user"), said], EchoEnv.tools)[2:]
            said = [int(i) for span in spans for i in span.ids]
        ids = np.asarray(said, np.int32)[: self.max_length - session.length]
        session.length += len(ids)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 8
        reason = "stop" if len(ids) == len(said) else "context"
        return Turn(ids, logprobs, logprobs, reason, weight_version=7)

    def close(self, session: ScriptedSession) -> None:
        self.num_open -= 1
