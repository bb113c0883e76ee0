"""Episodes: an engine plays the assistant in an environment, a group of them for every task.

In: tasks, an engine that holds the policy, a renderer. Out: `Episode`s, each with a `Trajectory`
whose ids are exactly what was sampled and what was fed. Nothing sampled is ever encoded again: the
spans of a turn are cut from its ids, and only the observation's ids are added.

What goes wrong is counted, never hidden: an episode whose environment crashed, timed out or gave
what cannot be used has `failure` set and does not train (its trajectory is empty where it could not
begin); one that ran out of context is `truncated`, keeps its reward of 0 and does. A group trains
when at least two of its episodes did not crash.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np

from agentx.env.base import CallRecord, Env, Observation, Task
from agentx.render import ToolRenderer
from agentx.sample.engine import Engine, Session
from agentx.trajectory import Message, Outcome, Span, ToolSpec, Trajectory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RolloutLimits:
    """Bounds of an episode: tokens of a turn, wall-clock seconds of env.reset and env.step."""

    max_new_tokens: int = 32
    step_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.step_timeout_s <= 0:
            raise ValueError(
                "max_new_tokens must be at least 1 and step_timeout_s positive, got "
                f"{self.max_new_tokens} and {self.step_timeout_s}"
            )


@dataclasses.dataclass
class Episode:
    """One attempt at a task. `failure` says why the environment broke down, where it did.

    messages: what the spans of the trajectory say, the assistant's as they were read. tools: those
    that were on offer.
    """

    task: Task
    trajectory: Trajectory
    calls: tuple[CallRecord, ...]
    reward: float
    truncated: bool = False
    failure: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolSpec, ...] = ()


async def _guarded(call: Awaitable[T], name: str, limits: RolloutLimits) -> tuple[T | None, str]:
    """What a coroutine of an environment returns, or else why it did not."""
    limit = asyncio.timeout(limits.step_timeout_s)
    try:
        async with limit:
            returned = await call
    except Exception as error:  # an environment's own fault must not end the run
        if limit.expired():
            return None, f"{name} took over {limits.step_timeout_s:g} s"
        return None, f"{name} raised {type(error).__name__}: {error}"
    return returned, f"{name} returned nothing" if returned is None else ""


def _read(observation: Observation, renderer: ToolRenderer) -> tuple[list[Span], str]:
    """The spans of an observation, or else why there are none."""
    if observation.done and not math.isfinite(observation.reward):
        return [], f"env.step gave a reward of {observation.reward}"
    try:
        return renderer.render_observations(observation.messages), ""
    except ValueError as error:
        return [], f"env.step gave what cannot be rendered: {error}"


def _read_prompt(
    messages: Sequence[Message], env: Env, renderer: ToolRenderer, max_length: int
) -> tuple[np.ndarray, str]:
    """The ids of a prompt, or else why no episode can begin with it."""
    try:
        spans = renderer.render(messages, env.tools)
    except ValueError as error:
        return np.zeros(0, np.int32), f"env.reset gave what cannot be rendered: {error}"
    ids = np.concatenate([s.ids for s in spans])
    if len(ids) >= max_length:
        return ids, f"the prompt has {len(ids)} tokens, which fills the context of {max_length}"
    return ids, ""


async def run_episode(
    engine: Engine,
    session: Session,
    env: Env,
    task: Task,
    messages: Sequence[Message],
    renderer: ToolRenderer,
    limits: RolloutLimits,
) -> Episode:
    """Plays one episode to its end in `session`, whose cache already holds the prompt."""
    spans = renderer.render(messages, env.tools)
    trajectory = Trajectory(spans, task_id=task.id, num_prompt_spans=len(spans))
    episode = Episode(task, trajectory, (), 0.0, tools=tuple(env.tools))
    said = list(messages)
    pending: np.ndarray = np.zeros(0, np.int32)
    failed_before = False
    while True:
        turn = await engine.generate(session, pending, limits.max_new_tokens)
        message = renderer.parse(turn.ids, env.tools)
        done, outcome = True, Outcome.FAILED
        observed: list[Span] = []
        answers: tuple[Message, ...] = ()
        if turn.stop_reason == "context":
            episode.truncated = True
        else:
            observation, episode.failure = await _guarded(env.step(message), "env.step", limits)
            if observation is not None:
                observed, episode.failure = _read(observation, renderer)
            if observation is not None and not episode.failure:
                done, answers = observation.done, observation.messages
                episode.reward = observation.reward if done else 0.0
                trajectory.info.update(observation.info)
                failed = any(m.outcome is Outcome.FAILED for m in observation.messages)
                recovered = failed_before and not failed and bool(message.tool_calls)
                outcome = Outcome.RECOVERED if recovered else Outcome.OK
                outcome = Outcome.FAILED if failed else outcome
                failed_before = failed
        spans.extend(renderer.sampled_spans(turn.ids, turn.logprobs, turn.weight_version, outcome))
        said.append(dataclasses.replace(message, outcome=outcome))
        if done:
            break
        pending = np.concatenate([s.ids for s in observed])
        if len(trajectory) + len(pending) >= engine.max_length:
            episode.truncated = True
            break
        spans.extend(observed)
        said.extend(answers)
    episode.messages = tuple(said)
    trajectory.reward = episode.reward
    trajectory.experts = session.experts
    episode.calls = tuple(env.calls)
    return episode


async def _run_group(
    engine: Engine,
    make_env: Callable[[], Env],
    task: Task,
    group: int,
    request_ids: Sequence[int],
    renderer: ToolRenderer,
    limits: RolloutLimits,
    on_episode: Callable[[Episode], None],
) -> list[Episode]:
    """All the episodes of one task: the prompt is prefilled once and forked."""
    envs = [make_env() for _ in request_ids]
    resets = [await _guarded(env.reset(task), "env.reset", limits) for env in envs]
    prompts = [messages for messages, _ in resets if messages is not None]
    if any(p != prompts[0] for p in prompts):
        raise ValueError(f"task {task.id}: its episodes began with different prompts")
    episodes = [
        Episode(task, Trajectory([], task_id=task.id), (), 0.0, failure=failure)
        for _, failure in resets
    ]
    ready = [number for number, (messages, _) in enumerate(resets) if messages is not None]
    if ready:
        ids, fault = _read_prompt(prompts[0], envs[ready[0]], renderer, engine.max_length)
        for number in ready:
            episodes[number].failure = fault
        asked = [] if fault else [request_ids[number] for number in ready]
        sessions = await engine.open_group(ids, asked) if asked else []

        async def play(number: int, session: Session) -> None:
            try:
                episodes[number] = await run_episode(
                    engine, session, envs[number], task, prompts[0], renderer, limits
                )
            finally:
                engine.close(session)
            on_episode(episodes[number])

        await asyncio.gather(*map(play, ready, sessions))
    for episode in episodes:
        episode.trajectory.group = group
    return episodes


def run_groups(
    engine: Engine,
    make_env: Callable[[], Env],
    tasks: Sequence[Task],
    renderer: ToolRenderer,
    limits: RolloutLimits,
    *,
    group_size: int,
    first_request: int = 0,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> list[list[Episode]]:
    """`group_size` episodes for every task, all at once, in the order of `tasks`.

    Request ids count up from `first_request`: with the engine's seed they fix every draw, whatever
    order the episodes run in. on_episode: told of every episode that was played, as it ends.
    """

    async def all_groups() -> list[list[Episode]]:
        return await asyncio.gather(
            *(
                _run_group(
                    engine,
                    make_env,
                    task,
                    number,
                    range(
                        first_request + number * group_size,
                        first_request + (number + 1) * group_size,
                    ),
                    renderer,
                    limits,
                    on_episode,
                )
                for number, task in enumerate(tasks)
            )
        )

    return asyncio.run(all_groups())


def trainable(groups: Sequence[Sequence[Episode]]) -> tuple[list[list[Episode]], dict[str, float]]:
    """The groups that train, and the counts of what did not.

    Crashed episodes leave their group; a group with fewer than two left cannot compare and goes.
    """
    kept, crashed, dropped = [], 0, 0
    for group in groups:
        whole = [e for e in group if not e.failure]
        crashed += len(group) - len(whole)
        if len(whole) >= 2:
            kept.append(whole)
        else:
            dropped += 1
    episodes = [e for group in groups for e in group]
    return kept, {
        "episodes": float(len(episodes)),
        "episodes_crashed": float(crashed),
        "episodes_truncated": float(sum(e.truncated for e in episodes)),
        "groups_dropped": float(dropped),
    }
