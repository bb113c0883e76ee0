"""From stores to batches: rows planned once, read at random, mixed by exact shares.

Enters: sources (a store, an objective and a share each). Leaves: `batch(step)`, a pure function of
the step, so that the data position of a run is one integer and a restart costs nothing.

1. `plan_rows` packs the trajectories of a store into rows of one fixed length, once. Rows are
   equally long, so shares of rows are shares of tokens, which shares of documents would not be.
2. `read_row` applies the objective to each piece of a row: pure in (seed, epoch, row).
3. `MixturePipeline` shuffles the rows of each source anew in every epoch and mixes the sources with
   `grain.MapDataset.mix`, whose index arithmetic finds the row of any slot without a state.

An objective may lengthen a document; the plan reserves the room it asks for (`Objective.room`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import numpy as np

from agentx.batch import Batch
from agentx.data.objectives import Example, Objective, random_generator
from agentx.data.pack import best_fit, pack_rows
from agentx.data.store import TokenStore

# The stream of random numbers that seeds the sources; objectives have their own.
_SOURCE = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces of which trajectories stand in which row of `length` places.

    Row r holds the pieces `row_start[r]` to `row_start[r + 1]`; piece p is tokens `begin[p]` to
    `end[p]` of trajectory `document[p]`. All i64. num_split: trajectories longer than a row, which
    were cut. num_short: trajectories of one token, which have nothing to predict and are left out.
    fill: the share of all places that hold a token or are reserved for one.
    """

    length: int
    row_start: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    num_split: int
    num_short: int
    fill: float

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1


def plan_rows(store: TokenStore, objective: Objective, length: int) -> Plan:
    """Packs a store into rows, best fit, each trajectory whole unless it is longer than a row.

    A longer one is cut at the last border of spans that fits, or, within a span longer than a row,
    anywhere. Each piece begins with the last token of the one before, so that every token but the
    first is predicted once. Raises ValueError where nothing is left to predict.
    """
    pieces: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    num_split = num_short = 0
    for document in range(len(store)):
        tokens = int(store.lengths[document])
        room = objective.room(store[document])
        if room >= length:
            raise ValueError(f"the objective reserves {room} places in rows of {length}")
        if tokens < 2:
            num_short += 1
            continue
        cuts = _cuts(tokens, store.span_ends(document), length - room)
        num_split += len(cuts) > 1
        for begin, end in cuts:
            pieces.append((document, begin, end))
            sizes.append(end - begin - 1 + room)
    if not pieces:
        raise ValueError(f"{store.path} has no trajectory of more than one token")
    rows = best_fit(sizes, length)
    order = [piece for row in rows for piece in row]
    document, begin, end = np.array(pieces, np.int64)[order].T
    row_start = np.cumsum([0, *(len(row) for row in rows)])
    fill = sum(sizes) / (len(rows) * length)
    return Plan(length, row_start, document, begin, end, num_split, num_short, fill)


def _cuts(tokens: int, span_ends: np.ndarray, places: int) -> list[tuple[int, int]]:
    """Where to cut a trajectory so that no piece takes more than `places` places."""
    cuts: list[tuple[int, int]] = []
    begin = 0
    while True:
        end = begin + places + 1
        if end >= tokens:
            return [*cuts, (begin, tokens)]
        border = int(span_ends[np.searchsorted(span_ends, end, side="right") - 1])
        if begin + 1 < border <= end:
            end = border
        cuts.append((begin, end))
        begin = end - 1


def read_row(
    store: TokenStore, plan: Plan, objective: Objective, seed: int, epoch: int, row: int
) -> list[Example]:
    """The examples of one row: the same for the same arguments, in any process and any order.

    A piece's index, for its random draws, is the number of tokens before it in the store: so it
    does not change when the length of the rows does.
    """
    examples = []
    for piece in range(plan.row_start[row], plan.row_start[row + 1]):
        document, begin = int(plan.document[piece]), int(plan.begin[piece])
        trajectory = store.piece(document, begin, int(plan.end[piece]))
        index = store.token_start(document) + begin
        examples.append(objective(trajectory, seed, epoch, index))
    return examples


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a mixture. `name` serves messages only.

    share: of the rows, relative to the other sources'.
    """

    name: str
    store: TokenStore
    objective: Objective
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row of one source, as the schedule asks for it."""

    source: int
    epoch: int
    row: int


class MixturePipeline:
    """Batches of [rows_per_batch, length] from several sources, by step.

    Over any stretch of slots each source has its share of the rows to within one or so. `plans` are
    the row plans, in the order of `sources`. `fingerprint` changes with anything that changes a
    batch: the stores, the objectives, the shares, the shape, the seed.
    """

    def __init__(self, sources: Sequence[Source], rows_per_batch: int, length: int, seed: int):
        if not sources:
            raise ValueError("a mixture needs at least one source")
        if rows_per_batch < 1 or length < 1:
            raise ValueError(f"a batch of {rows_per_batch} rows of {length} places holds nothing")
        for source in sources:
            if not (np.isfinite(source.share) and source.share > 0):
                raise ValueError(
                    f"source {source.name!r} has a share of {source.share}; "
                    "give a positive one, or leave the source out"
                )
        self.sources, self.rows_per_batch = tuple(sources), rows_per_batch
        self.length, self.seed = length, seed
        self.plans = tuple(plan_rows(s.store, s.objective, length) for s in sources)
        # A seed for each source, so that equal stores do not make equal draws.
        self._seeds = tuple(
            int(random_generator(seed, 0, number, _SOURCE).integers(1 << 31))
            for number in range(len(sources))
        )
        datasets = []
        for number, (plan, source_seed) in enumerate(zip(self.plans, self._seeds, strict=True)):
            rows = grain.MapDataset.range(plan.num_rows).seed(source_seed).shuffle()
            make_draw = functools.partial(_make_draw, number, plan.num_rows)
            datasets.append(rows.repeat().map_with_index(make_draw))
        total = sum(s.share for s in sources)
        shares = [s.share / total for s in sources]
        self._schedule: Any = grain.MapDataset.mix(datasets, weights=shares)
        identity = [(s.store.fingerprint, repr(s.objective), s.share) for s in sources]
        content = repr((identity, rows_per_batch, length, seed))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def draws(self, step: int) -> list[Draw]:
        """Which row of which source fills each row of a batch."""
        first = step * self.rows_per_batch
        return [self._schedule[slot] for slot in range(first, first + self.rows_per_batch)]

    def examples(self, step: int) -> list[list[Example]]:
        """The examples of each row of a batch."""
        rows = []
        for draw in self.draws(step):
            source, plan = self.sources[draw.source], self.plans[draw.source]
            seed = self._seeds[draw.source]
            rows.append(read_row(source.store, plan, source.objective, seed, draw.epoch, draw.row))
        return rows

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0: numpy arrays, [rows_per_batch, length] each."""
        return pack_rows(self.examples(step), self.length)


def _make_draw(source: int, num_rows: int, index: int, row: int) -> Draw:
    return Draw(source, index // num_rows, row)


def prefetch(
    make_batch: Callable[[int], Batch],
    start: int,
    stop: int,
    *,
    depth: int = 2,
    timeout_s: float = 120.0,
) -> Generator[tuple[int, Batch], None, None]:
    """Yields `(step, make_batch(step))` for the steps, made ahead of time by one thread.

    `depth` batches wait at most. An error in `make_batch` is raised here. Raises TimeoutError,
    which says what was waited for, where a batch takes longer than `timeout_s` seconds.
    """
    ready: queue.Queue[tuple[int, Batch | BaseException]] = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        for step in range(start, stop):
            item: Batch | BaseException
            try:
                item = make_batch(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not closed.is_set():
                try:
                    ready.put((step, item), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if closed.is_set() or isinstance(item, BaseException):
                return

    threading.Thread(target=produce, name="agentx-data-prefetch", daemon=True).start()
    try:
        for expected in range(start, stop):
            try:
                step, item = ready.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(
                    f"waited {timeout_s:g} s for the data pipeline to make batch {expected}"
                ) from None
            if isinstance(item, BaseException):
                raise item
            yield step, item
    finally:
        closed.set()
