"""From stores to batches: rows planned once, read at random, mixed by exact shares of tokens.

Enters: sources (a store, an objective and a share each). Leaves: `batch(step)`, a pure function of
the step, so that the data position of a run is one integer and a restart costs nothing.

1. `plan_of` packs the trajectories of a store into rows of one fixed length, once.
2. `read_rows` applies the objective to each piece of a row: pure in (seed, epoch, row).
3. `MixturePipeline` shuffles the rows of each source anew in every epoch and mixes the sources with
   `grain.MapDataset.mix`, whose index arithmetic finds the row of any slot without a state. Rows
   are equally long; what they hold differs a little, and the weights of the mix make up for it.
4. Each host reads its own rows of a batch, whatever the number of hosts.

An objective may lengthen a document; the plan reserves the room it asks for (`Objective.room`).
Shares are of the stores' own tokens, before an objective adds some.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import numpy as np

from agentx.batch import Batch
from agentx.data.objectives import Example, Objective, random_generator
from agentx.data.pack import pack_rows
from agentx.data.plan import Plan, plan_of, pools_of
from agentx.data.store import TokenStore

# The stream of random numbers that seeds the sources; objectives have their own.
_SOURCE = 2
# Batches that are made before they are asked for.
_AHEAD = 2
# More draws than any run makes of one source.
_ENDLESS = 1 << 40


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a mixture. `name` serves messages only.

    share: of the tokens, relative to the other sources'.
    """

    name: str
    store: TokenStore
    objective: Objective
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shares that hold up to a share of training, in the order of the sources; 0 leaves one out.

    until: the first step that is not of the stage is the first at which step / num_steps is that.
    """

    until: float
    shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Draw:
    """One row of one source, as the schedule asks for it."""

    source: int
    epoch: int
    row: int


def read_rows(
    store: TokenStore, plan: Plan, objective: Objective, seed: int, draws: Sequence[Draw]
) -> list[list[Example]]:
    """The examples of rows: the same for the same arguments, in any process and any order.

    A piece's index, for its random draws, is the number of tokens before it in the store: so it
    does not change when the length of the rows does.
    """
    pieces = [plan.pieces(draw.row) for draw in draws]
    trajectories = iter(store.pieces([piece for row in pieces for piece in row]))
    return [
        [
            objective(next(trajectories), seed, draw.epoch, store.token_start(document) + begin)
            for document, begin, _ in row
        ]
        for draw, row in zip(draws, pieces, strict=True)
    ]


class MixturePipeline:
    """Batches of [rows_per_batch, length] from several sources, by step.

    Over any stretch of slots each source has its share of the tokens to within a row or so. A stage
    goes on with each source where the one before left it. An objective that changes in the course
    of training (it has a method `at`) is asked for the one of the step.

    num_steps: of the training, which stages and such objectives are shares of. plans: the row
    plans, in the order of `sources`. identity: what the batches depend on, by name.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows_per_batch: int,
        length: int,
        seed: int,
        *,
        num_steps: int | None = None,
        stages: Sequence[Stage] = (),
    ):
        """Raises ValueError for shares that would drop a source, and where nothing can be read."""
        if not sources:
            raise ValueError("a mixture needs at least one source")
        if rows_per_batch < 1 or length < 1:
            raise ValueError(f"a batch of {rows_per_batch} rows of {length} places holds nothing")
        self.sources, self.rows_per_batch = tuple(sources), rows_per_batch
        self.length, self.seed = length, seed
        stages = tuple(stages) or (Stage(1.0, tuple(source.share for source in sources)),)
        _check_stages(self.sources, stages)
        changes = len(stages) > 1 or any(hasattr(s.objective, "at") for s in sources)
        if changes and not num_steps:
            raise ValueError("stages and schedules are shares of a training: say its num_steps")
        self._num_steps = num_steps or 0
        self.plans = tuple(plan_of(s.store, s.objective, length) for s in sources)
        # A seed for each source, so that equal stores do not make equal draws.
        self._seeds = tuple(
            int(random_generator(seed, 0, number, _SOURCE).integers(1 << 31))
            for number in range(len(sources))
        )
        self._orders: list[Any] = [
            grain.MapDataset.range(plan.num_rows).seed(source_seed).shuffle().repeat()
            for plan, source_seed in zip(self.plans, self._seeds, strict=True)
        ]
        self._parts = self._schedule(stages)
        self.identity = {
            "rows": f"{rows_per_batch} of {length} tokens",
            "seed": str(seed),
            "shares": repr(stages),
            **({"number of steps": str(num_steps)} if changes else {}),
        }
        for number, (source, plan) in enumerate(zip(self.sources, self.plans, strict=True)):
            self.identity |= {
                f"store of dataset {number}": source.store.fingerprint,
                f"objective of dataset {number}": repr(source.objective),
                f"plan of dataset {number}": plan.fingerprint,
            }
            for path, found in pools_of(source.store, source.objective).items():
                self.identity[f"store {path} that dataset {number} draws from"] = found

    def draws(self, step: int, host: int = 0, num_hosts: int = 1) -> list[Draw]:
        """Which row of which source fills each row of a batch, or of a host's part of it."""
        if self.rows_per_batch % num_hosts or not 0 <= host < num_hosts:
            raise ValueError(
                f"{self.rows_per_batch} rows can't be split over {num_hosts} hosts, of which this "
                f"is number {host}: make the rows a multiple of the hosts"
            )
        rows = self.rows_per_batch // num_hosts
        first = step * self.rows_per_batch + host * rows
        return [self._draw(slot) for slot in range(first, first + rows)]

    def examples(self, step: int, host: int = 0, num_hosts: int = 1) -> list[list[Example]]:
        """The examples of each row of a batch, or of a host's part of it."""
        draws = self.draws(step, host, num_hosts)
        rows: list[list[Example]] = [[] for _ in draws]
        for number, source in enumerate(self.sources):
            own = [at for at, draw in enumerate(draws) if draw.source == number]
            if own:
                made = read_rows(
                    source.store,
                    self.plans[number],
                    self.objective(number, step),
                    self._seeds[number],
                    [draws[at] for at in own],
                )
                for at, examples in zip(own, made, strict=True):
                    rows[at] = examples
        return rows

    def batch(self, step: int, host: int = 0, num_hosts: int = 1) -> Batch:
        """The batch of a step, counted from 0: numpy arrays, [rows_per_batch, length] each.

        Of several hosts each has the rows of its number, in order: together they are the batch of
        one, so that a run goes on with another number of hosts where it was.
        """
        return pack_rows(self.examples(step, host, num_hosts), self.length)

    def objective(self, source: int, step: int) -> Objective:
        """What is made of a source at a step."""
        objective = self.sources[source].objective
        if not hasattr(objective, "at"):
            return objective
        chosen: Objective = objective.at(min(step / self._num_steps, np.nextafter(1, 0)))
        return chosen

    def shares(self, step: int) -> tuple[float, ...]:
        """The share of the tokens that each source is asked for at a step. They add up to 1."""
        shares = self._part(step * self.rows_per_batch).shares
        return tuple(share / sum(shares) for share in shares)

    def _part(self, slot: int) -> _Part:
        return next(part for part in reversed(self._parts) if part.first <= slot)

    def _draw(self, slot: int) -> Draw:
        part = self._part(slot)
        source, index = part.mix[slot - part.first]
        index += part.taken[source]
        return Draw(source, index // self.plans[source].num_rows, self._orders[source][index])

    def _schedule(self, stages: Sequence[Stage]) -> list[_Part]:
        parts: list[_Part] = []
        first, taken = 0, [0] * len(self.sources)
        for stage in stages:
            # A share of tokens, as a share of rows: some rows hold more tokens than others.
            weights = [
                share * plan.num_rows / plan.num_targets
                for share, plan in zip(stage.shares, self.plans, strict=True)
            ]
            parts.append(_Part(first, tuple(taken), _mix(weights), stage.shares))
            if stage is not stages[-1]:
                end = _first_step(stage.until, self._num_steps) * self.rows_per_batch
                for source, count in parts[-1].counts(end - first).items():
                    taken[source] += count
                first = end
        return parts


@dataclasses.dataclass(frozen=True)
class _Part:
    """One stage of the schedule.

    first: its first slot. taken: what was drawn of each source before it. mix: from a slot of its
    own to a source, and how many of that source's came before it in the stage. shares: of the
    stage.
    """

    first: int
    taken: tuple[int, ...]
    mix: Any
    shares: tuple[float, ...]

    def counts(self, num_slots: int) -> dict[int, int]:
        """How many of the first slots go to each source: as the last of each says."""
        counts: dict[int, int] = {}
        for slot in reversed(range(num_slots)):
            source, index = self.mix[slot]
            counts.setdefault(source, index + 1)
            if len(counts) == sum(share > 0 for share in self.shares):
                break
        return counts


def _first_step(until: float, num_steps: int) -> int:
    """The first step at which a stage or a schedule has got to `until`, a share of training."""
    step = max(round(until * num_steps) - 1, 0)
    while step / num_steps < until:
        step += 1
    return step


def _mix(weights: Sequence[float]) -> Any:
    total = sum(weights)
    chosen = [number for number, weight in enumerate(weights) if weight > 0]
    counted = [
        grain.MapDataset.range(_ENDLESS).map(lambda i, number=number: (number, i))
        for number in chosen
    ]
    return grain.MapDataset.mix(counted, weights=[weights[n] / total for n in chosen])


def _check_stages(sources: Sequence[Source], stages: Sequence[Stage]) -> None:
    untils = [stage.until for stage in stages]
    if untils != sorted(set(untils)) or not untils[0] > 0 or untils[-1] != 1:
        raise ValueError(
            f"the stages end at {', '.join(f'{u:g}' for u in untils)} of the training; the ends "
            "must grow, from above 0 to 1"
        )
    for number, stage in enumerate(stages):
        if len(stage.shares) != len(sources):
            raise ValueError(
                f"stage {number} has {len(stage.shares)} shares for {len(sources)} sources"
            )
    for number, source in enumerate(sources):
        shares = [stage.shares[number] for stage in stages]
        if not (all(np.isfinite(s) and s >= 0 for s in shares) and sum(shares) > 0):
            shown = ", ".join(f"{s}" for s in shares)
            raise ValueError(
                f"source {source.name!r} has a share of {shown}; "
                "give a positive one, or leave the source out"
            )
    for number, stage in enumerate(stages):
        if not sum(stage.shares):
            raise ValueError(f"stage {number} leaves out every source")


def prefetch(
    make_batch: Callable[[int], Batch],
    start: int,
    stop: int,
    *,
    timeout_s: float = 120.0,
) -> Generator[tuple[int, Batch], None, None]:
    """Yields `(step, make_batch(step))` for the steps, made ahead of time by one thread.

    Two batches wait at most. An error in `make_batch` is raised here. Raises TimeoutError,
    which says what was waited for, where a batch takes longer than `timeout_s` seconds.
    """
    ready: queue.Queue[tuple[int, Batch | BaseException]] = queue.Queue(_AHEAD)
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
