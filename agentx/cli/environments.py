"""Does a task set keep the contract of agentx/env/base.py? A few of its tasks are played to see."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

import numpy as np

from agentx.cli.annotations import coerce
from agentx.cli.registry import REGISTRY, find_class
from agentx.env.base import Env, Observation, Task, TaskSet
from agentx.trajectory import Message, ToolCall

_MAX_STEPS = 100
_STEP_TIMEOUT_S = 60.0

_WRONG_ANSWER = Message("assistant", "no task has this for an answer")
_UNREADABLE = Message("assistant", malformed="nothing that can be read")
_UNKNOWN_TOOL = Message("assistant", tool_calls=(ToolCall("no_such_tool", {}),))


def check_environment(name: str, num_tasks: int = 50) -> str:
    """Plays `num_tasks` tasks, drawn with a seed, in four ways each; returns what was seen.

    name: of a task set in `registry.REGISTRY`. Raises ValueError for the first task that breaks
    the contract.
    """
    cls = find_class(name, "agentx env check")
    try:
        task_set = coerce(cls(), TaskSet)
    except TypeError:
        raise ValueError(f"{name} is no task set: give one of {_task_sets()}") from None
    rng = np.random.Generator(np.random.Philox(key=0))
    answers: collections.Counter[str] = collections.Counter()
    longest = 0
    chosen = rng.permutation(len(task_set))[:num_tasks]
    for index in map(int, chosen):
        task = task_set.task(index, seed=index)
        where = f"{name}, task {index}"
        if task_set.task(index, seed=index) != task:
            raise ValueError(f"{where}: the same seed gives another task the second time")
        answers[task.answer] += 1
        longest = max(longest, _check_episodes(task_set, task, where))
    [(answer, count)] = answers.most_common(1)
    tools = ", ".join(tool.name for tool in task_set.env().tools)
    return (
        f"tasks        {len(task_set)}, of which {len(chosen)} were played\n"
        f"tools        {tools}\n"
        f"episodes     end after {longest} unreadable messages at most\n"
        f"best guess   {answer!r} answers {count / len(chosen):.0%} of the tasks played"
    )


def _task_sets() -> str:
    return ", ".join(name for name, path in REGISTRY.items() if ".env." in path and "Task" in name)


def _check_episodes(task_set: TaskSet, task: Task, where: str) -> int:
    """Plays one task badly in three ways and well in one; returns the steps of the longest."""
    for bad in (_UNREADABLE, _UNKNOWN_TOOL):
        first, second = (_play(task_set.env(), task, bad, where) for _ in range(2))
        if first != second:
            raise ValueError(f"{where}: the same messages have other observations the second time")
        if first[-1].reward >= 1:
            raise ValueError(f"{where}: the full reward goes to an episode without an answer")
    wrong = _play(task_set.env(), task, _WRONG_ANSWER, where)
    if wrong[-1].reward >= 1:
        raise ValueError(f"{where}: the full reward goes to a wrong answer")
    right = _play(task_set.env(), task, Message("assistant", task.answer), where)
    if right[-1].reward <= wrong[-1].reward:
        raise ValueError(
            f"{where}: its own answer, {task.answer!r}, earns no more than a wrong one"
        )
    return len(first)


def _play(env: Env, task: Task, message: Message, where: str) -> list[Observation]:
    """Every observation of an episode whose assistant says one thing over and over."""

    async def play() -> list[Observation]:
        messages = await env.reset(task)
        if not messages:
            raise ValueError(f"{where}: reset gives no message")
        seen: list[Observation] = []
        while not seen or not seen[-1].done:
            if len(seen) == _MAX_STEPS:
                raise ValueError(f"{where}: the episode goes on after {_MAX_STEPS} steps")
            seen.append(await _in_time(env.step(message), where))
        return seen

    return asyncio.run(play())


async def _in_time(step: Any, where: str) -> Observation:
    try:
        observation: Observation = await asyncio.wait_for(step, _STEP_TIMEOUT_S)
    except TimeoutError:
        raise ValueError(f"{where}: a step took more than {_STEP_TIMEOUT_S:.0f} s") from None
    return observation
