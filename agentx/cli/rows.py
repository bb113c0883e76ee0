"""Rows as the model sees them: a row of a run's batch, or one document of a store by itself.

Enters: a run file's config and the numbers of a step and a row; or a store and the number of a
document. Leaves: a `Row`, which `agentx.cli.screen` prints and `agentx.report.row` draws. The
batch is made by what makes a training's batches, so what is shown is what is trained on.

A weight belongs to the token that is predicted. So the weight shown at a token is the one that the
batch has a place before, and a segment's first token, which nothing predicts, has none.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agentx.batch import Batch
from agentx.cli.records import as_trajectory, token_texts
from agentx.data.objectives import Example, NextToken
from agentx.data.pack import pack_rows
from agentx.data.pipeline import MixturePipeline
from agentx.data.store import TokenStore
from agentx.report import trajectory_record
from agentx.source import DatasetSource, MixtureSource
from agentx.tokenizer import Tokenizer
from agentx.train import TrainConfig
from agentx.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens `begin` to `end` of a document of `length` tokens, as an objective made them.

    source: the store's name, and that of the document's source in it, where it has several.
    stored: the tokens as the store has them. objective: its name. place: in the row, of the first
    token.
    """

    source: str
    document: int
    begin: int
    end: int
    length: int
    stored: Trajectory
    objective: str
    example: Example
    place: int

    @property
    def num_places(self) -> int:
        """The last token is only predicted, and takes no place."""
        return max(len(self.example) - 1, 0)

    @property
    def change(self) -> str:
        """What the objective did besides giving weights; "" where it left the tokens alone."""
        if np.array_equal(self.example.ids, self.stored.ids):
            return ""
        more = len(self.example) - len(self.stored)
        by = f"changed by {self.objective}"
        return f"{by}, {abs(more)} tokens {'more' if more > 0 else 'fewer'}" if more else by

    @property
    def piece(self) -> str:
        """Which part of the document it is."""
        if self.end - self.begin == self.length:
            return f"whole, {self.length:,} tokens"
        return f"tokens {self.begin:,} to {self.end:,} of {self.length:,}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of the mixture: its share of the tokens, asked for and had; its rows in the batch.

    plan: how its documents stand in rows, in words.
    """

    name: str
    objective: str
    share: float
    had: float
    num_rows: int
    plan: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A row, the batch that it is one of, and where that came from.

    number: of the row in the batch. parts: the mixture; empty for a document by itself.
    """

    title: str
    place: str
    tokenizer: Tokenizer
    segments: list[Segment]
    number: int
    batch: Batch
    parts: list[Part]

    @property
    def length(self) -> int:
        """Its places, padding included."""
        return int(self.batch.tokens.shape[1])


class Run(NamedTuple):
    """Tokens in a row of which each sees the ones before: places `begin` to `end`.

    subtree_end: up to where later places see them too. position: of the first. parent: the number
    of the run that it continues, or -1. depth: how many runs it continues, one after the other.
    """

    begin: int
    end: int
    subtree_end: int
    position: int
    parent: int
    depth: int


def runs_of(row: Row) -> list[Run]:
    """The forest of a row, in the order of its places: what `prefix_tree` of layout.py was given.

    A packed document is a run without a parent; a prompt's continuations are runs below it.
    """
    subtree_end = np.asarray(row.batch.layout.subtree_end[row.number])
    position = np.asarray(row.batch.layout.position[row.number])
    used = int((subtree_end > 0).sum())
    places = np.arange(1, used)
    ends = (position[places] != position[places - 1] + 1) | (
        subtree_end[places] != subtree_end[places - 1]
    )
    borders = [0, *places[ends].tolist(), used] if used else []
    runs: list[Run] = []
    path: list[int] = []
    for number, (begin, end) in enumerate(itertools.pairwise(borders)):
        while path and runs[path[-1]].subtree_end <= begin:
            path.pop()
        parent = path[-1] if path else -1
        first = int(position[begin])
        runs.append(Run(begin, end, int(subtree_end[begin]), first, parent, len(path)))
        path.append(number)
    return runs


# --------------------------------------------------------------------------------------------------
# From a run file, and from a store
# --------------------------------------------------------------------------------------------------


def read_row(config: TrainConfig, path: str, number: int, step: int) -> Row:
    """Row `number` of the batch of a step. path: the run file's, for sentences.

    Raises ValueError for a row or a step that there is not, and for a run without data.
    """
    mixture = config.source
    source = mixture.data if isinstance(mixture, MixtureSource) else mixture
    scale = mixture.data_weight if isinstance(mixture, MixtureSource) else 1.0
    if not isinstance(source, DatasetSource):
        raise ValueError(f"{path} trains on rollouts alone, which have no rows before the run")
    if not 0 <= number < source.rows:
        last = source.rows - 1
        raise ValueError(f"--row {number}: a batch of {path} has rows 0 to {last} of data")
    if not 0 <= step < config.num_steps:
        raise ValueError(f"--step {step}: {path} trains for steps 0 to {config.num_steps - 1}")
    tokenizer = Tokenizer.load(config.tokenizer)
    pipeline = source.pipeline(tokenizer, config.seed, config.num_steps)
    rows = pipeline.examples(step)
    batch = pack_rows(rows, source.length)
    batch = batch._replace(weights=batch.weights * np.float32(scale))
    return Row(
        f"row {number} of batch {step}",
        path,
        tokenizer,
        _segments(pipeline, step, number, rows[number], scale),
        number,
        batch,
        _parts(pipeline, step, batch),
    )


def read_document(path: str, tokenizer_path: str, index: int) -> tuple[Row, int]:
    """A document of a store in a row by itself, as `NextToken` weighs it; and how many there are.

    Of a store that is not complete, what there is so far.
    """
    tokenizer = Tokenizer.load(tokenizer_path)
    store = TokenStore.open(path, tokenizer_fingerprint=tokenizer.fingerprint, partial=True)
    if not len(store):
        raise ValueError(f"{path} holds no document yet")
    if not 0 <= index < len(store):
        raise ValueError(f"--index {index}: {path} holds documents 0 to {len(store) - 1}")
    stored, length = store[index], int(store.lengths[index])
    example = NextToken()(stored, seed=0, epoch=0, index=index)
    segment = Segment(
        _source_name(store, index), index, 0, length, length, stored, "NextToken", example, 0
    )
    batch = pack_rows([[example]], max(segment.num_places, 1))
    row = Row(f"document {index}", path, tokenizer, [segment], 0, batch, [])
    return row, len(store)


def _segments(
    pipeline: MixturePipeline, step: int, number: int, examples: list[Example], scale: float
) -> list[Segment]:
    draw = pipeline.draws(step)[number]
    store = pipeline.sources[draw.source].store
    pieces = pipeline.plans[draw.source].pieces(draw.row)
    segments: list[Segment] = []
    for piece, stored, example in zip(pieces, store.pieces(pieces), examples, strict=True):
        last = segments[-1] if segments else None
        segments.append(
            Segment(
                _source_name(store, piece[0]),
                *piece,
                int(store.lengths[piece[0]]),
                stored,
                type(pipeline.objective(draw.source, step)).__name__,
                dataclasses.replace(example, weights=example.weights * np.float32(scale)),
                last.place + last.num_places if last else 0,
            )
        )
    return segments


def _parts(pipeline: MixturePipeline, step: int, batch: Batch) -> list[Part]:
    tokens = np.asarray(batch.layout.subtree_end > 0).sum(axis=1)
    drawn = np.array([draw.source for draw in pipeline.draws(step)])
    return [
        Part(
            Path(source.name).name,
            type(pipeline.objective(number, step)).__name__,
            share,
            float(tokens[drawn == number].sum() / tokens.sum()),
            int((drawn == number).sum()),
            str(plan),
        )
        for number, (source, plan, share) in enumerate(
            zip(pipeline.sources, pipeline.plans, pipeline.shares(step), strict=True)
        )
    ]


def _source_name(store: TokenStore, document: int) -> str:
    name, inner = Path(store.path).name, store.sources[store.source_of[document]]
    return f"{name} ({inner})" if len(store.sources) > 1 and inner else name


# --------------------------------------------------------------------------------------------------
# Figures, and the entries that the page is drawn from
# --------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Of a row, or of a batch. weight: the sum of the weights, which the loss is divided by."""

    tokens: int
    trained: int
    padding: int
    weight: float

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, {self.trained:,} of them trained with a weight of "
            f"{self.weight:,.6g} in all, {self.padding:,} places of padding"
        )


def figures(batch: Batch, rows: slice = slice(None)) -> Figures:
    """Counted in places: each holds a token and predicts the next."""
    used = np.asarray(batch.layout.subtree_end[rows]) > 0
    weights = np.asarray(batch.weights[rows])
    return Figures(
        int(used.sum()),
        int((weights != 0).sum()),
        int((~used).sum()),
        float(weights.sum(dtype=np.float64)),
    )


def segment_record(row: Row, segment: Segment) -> dict[str, Any]:
    """A segment as an entry of trajectories.json, whose tokens have their place and position too.

    is_marker: whether the tokenizer made the token a marker, which no text can spell. The last
    token has neither place nor position, for it is only predicted.
    """
    example, pieces = segment.example, row.tokenizer.pieces
    trajectory = as_trajectory(example)
    record = trajectory_record(
        trajectory,
        token_texts(example.ids, row.tokenizer),
        example.weights,
        title=f"{segment.source} · document {segment.document:,}",
        stage="",
        task=segment.stored.task_id,
        outcome=segment.change,
    )
    position = row.batch.layout.position[row.number]
    for at, token in enumerate(record["tokens"]):
        token["is_marker"] = pieces[token["id"]].kind == "special"
        if at < segment.num_places:
            token["place"] = segment.place + at
            token["position"] = int(position[segment.place + at])
    reward = segment.stored.reward
    return {**record, "reward": float(reward) if np.isfinite(reward) else None}


def page_fields(row: Row) -> dict[str, Any]:
    """A row as `agentx.report.row` draws it: plain numbers and strings."""
    own = figures(row.batch, slice(row.number, row.number + 1))
    segments = [
        {
            **segment_record(row, segment),
            "piece": segment.piece,
            "begin": segment.place,
            "end": segment.place + segment.num_places,
        }
        for segment in row.segments
    ]
    return {
        "title": row.title,
        "source": row.place,
        "length": row.length,
        "row": own._asdict(),
        "batch": figures(row.batch)._asdict() if row.parts else None,
        "parts": [dataclasses.asdict(part) for part in row.parts],
        "runs": [run._asdict() for run in runs_of(row)],
        "segments": segments,
    }
