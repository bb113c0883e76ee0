"""Trajectories for the report: documents as objectives make them, and episodes as they went.

Each function returns entries of trajectories.json, see `agentx.report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentx.data.objectives import Example, Schedule
from agentx.data.store import TokenStore
from agentx.report import trajectory_record
from agentx.report.tokens import token_text
from agentx.rollout import Episode
from agentx.source import DatasetSource, SourceBatch
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory


def document_records(
    source: DatasetSource, tokenizer: Tokenizer, *, stage: str, seed: int
) -> list[dict[str, Any]]:
    """The first document of each dataset, with the loss weights that its objective gives.

    Those of a `Schedule` are of the beginning.
    """
    records = []
    for dataset in source.datasets:
        store = TokenStore.open(dataset.store, tokenizer_fingerprint=tokenizer.fingerprint)
        objective = dataset.objective
        if isinstance(objective, Schedule):
            objective = objective.at(0.0)
        example = objective(store[0], seed, 0, 0)
        trajectory = as_trajectory(example)
        records.append(
            trajectory_record(
                trajectory,
                token_texts(example.ids, tokenizer),
                example.weights,
                title=f"{stage}: a document of {Path(dataset.store).name}",
                stage=stage,
                task="",
                outcome="",
            )
        )
    return records


def rollout_records(
    made: SourceBatch, tokenizer: Tokenizer, *, stage: str, title: str
) -> list[dict[str, Any]]:
    """The best and the worst episode of the batch's first group that has both."""
    for group, advantages in zip(made.groups, made.advantages, strict=True):
        if np.any(advantages):
            return [
                _episode_record(group[e], tokenizer, stage, title, float(advantages[e]))
                for e in (int(np.argmax(advantages)), int(np.argmin(advantages)))
            ]
    return []


def ending_records(
    episodes: Sequence[Episode], tokenizer: Tokenizer, *, stage: str, title: str
) -> list[dict[str, Any]]:
    """Two episodes of each kind of ending."""
    endings = {
        "solved": [e for e in episodes if e.reward >= 1 and not any(c.failed for c in e.calls)],
        "solved after a failed call": [
            e for e in episodes if e.reward >= 1 and any(c.failed for c in e.calls)
        ],
        "not solved": [e for e in episodes if e.reward < 1],
    }
    return [
        _episode_record(episode, tokenizer, stage, f"{title}: {ending}", None)
        for ending, found in endings.items()
        for episode in found[:2]
    ]


def _episode_record(
    episode: Episode, tokenizer: Tokenizer, stage: str, title: str, advantage: float | None
) -> dict[str, Any]:
    trajectory = episode.trajectory
    sampled = trajectory.per_token("origin") == Origin.SAMPLED
    return trajectory_record(
        trajectory,
        token_texts(trajectory.ids, tokenizer),
        sampled.astype(np.float32),
        title=title,
        stage=stage,
        task=episode.task.prompt,
        outcome=episode.failure or ("solved" if episode.reward >= 1 else "not solved"),
        advantage=advantage,
    )


def token_texts(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What each token shows as, where it is part of a character too (see `token_text`)."""
    return [token_text(tokenizer.pieces[int(i)].data) for i in ids]


def as_trajectory(example: Example) -> Trajectory:
    """The tokens of an example as spans: a run of equal role, origin and outcome is one span."""
    kinds = np.stack([example.roles, example.origins, example.outcomes])
    borders = np.flatnonzero(np.any(kinds[:, 1:] != kinds[:, :-1], axis=0)) + 1
    spans = []
    for own in np.split(np.arange(len(example)), borders):
        role, origin, outcome = (int(k[own[0]]) for k in kinds)
        spans.append(Span(Role(role), example.ids[own], Origin(origin), Outcome(outcome)))
    return Trajectory(spans)
