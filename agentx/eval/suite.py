"""Plays a task set with a policy and scores it: the same rollouts as training, one episode a task.

The order of tasks is a seeded permutation of the set, so that any number of episodes is a fair and
repeatable sample of it, without repeats.
"""

from __future__ import annotations

import itertools
import json

import numpy as np

from agentx.env.base import TaskSet
from agentx.eval.scores import EpisodeResult
from agentx.metrics import Progress
from agentx.render import ToolRenderer
from agentx.rollout import Episode, RolloutLimits, run_groups
from agentx.sample.engine import Engine
from agentx.sample.sampling import check_seed


def result_of(episode: Episode) -> EpisodeResult:
    """What the scores need to know of an episode. A crashed one is no success."""
    return EpisodeResult(
        task_id=episode.task.id,
        success=episode.reward >= 1.0 and not episode.failure,
        num_calls=len(episode.calls),
        num_valid_calls=sum(c.valid for c in episode.calls),
        num_failed_calls=sum(c.failed for c in episode.calls),
        calls=tuple((c.name, json.dumps(c.arguments), c.observation) for c in episode.calls),
    )


def evaluate(
    engine: Engine,
    task_set: TaskSet,
    renderer: ToolRenderer,
    limits: RolloutLimits,
    *,
    num_episodes: int,
    seed: int,
    title: str = "evaluate",
) -> list[Episode]:
    """`num_episodes` episodes, one for each of as many tasks, at the engine's temperature.

    title: of the progress line. Raises ValueError where the set has fewer tasks than that,
    and for a seed that is not in [0, 2^31).
    """
    if num_episodes > len(task_set):
        raise ValueError(
            f"{num_episodes} episodes were asked for but the task set has {len(task_set)} tasks: "
            f"ask for at most {len(task_set)}"
        )
    check_seed("seed", seed)
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = rng.permutation(len(task_set))[:num_episodes]
    tasks = [task_set.task(int(i), seed=int(rng.integers(2**62))) for i in chosen]
    with Progress(title, num_episodes) as progress:
        played = itertools.count(1)
        groups = run_groups(
            engine,
            task_set.env,
            tasks,
            renderer,
            limits,
            group_size=1,
            on_episode=lambda _: progress.update(next(played)),
        )
    return [group[0] for group in groups]
