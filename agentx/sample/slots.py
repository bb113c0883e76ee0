"""The slots: the rows of a KV cache on the device, and one slice of work on them.

The cache has one of a few sizes, as small as what lives in it allows: a step's time grows with rows
and columns, used or not. What is in which row is the engine's business; here it arrives as a
`Slice`.

Legend: B rows, R rows fed at once, T tokens fed to a row at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from agentx.model.config import ModelConfig
from agentx.model.lora import LoraConfig, adapted
from agentx.model.transformer import abstract_transformer
from agentx.sample.programs import MAX_STEPS, Decoded, Programs, Rows
from agentx.sample.sampling import SamplingParams

# Columns of the least size of caches whose rows may be long.
_LEAST_OF_LONG = 512


@dataclasses.dataclass(frozen=True)
class Reading:
    """`ids` are read into `row`, whose first `start` columns are in use."""

    row: int
    ids: list[int]
    start: int


@dataclasses.dataclass(frozen=True)
class Running:
    """A row that samples: from its last id on, which stands at position `length`."""

    row: int
    token: int
    length: int
    request_id: int
    budget: int
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True)
class Slice:
    """What to do with the slots, in this order.

    source: row b becomes what row source[b] was. keeps: whether any row holds something to keep; if
      not, source only says how many rows there are.
    columns: how many are needed at least. prompts: read first. copies: (from, to), rows.
    readings: read then. running: then sample, until at most `floor` of these rows go on.
    """

    source: list[int]
    keeps: bool
    columns: int
    prompts: list[Reading]
    copies: list[tuple[int, int]]
    readings: list[Reading]
    running: list[Running]
    floor: int


class Done(NamedTuple):
    """What a slice leaves: what was decoded, and the experts that the tokens of its prompts and of
    its readings took, i32[n, L, k] each (see `Decoded`)."""

    decoded: Decoded
    prompts: list[np.ndarray]
    readings: list[np.ndarray]


class Slots:
    """The cache of an engine and its sizes. See `Engine` for the arguments."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        num_slots: int,
        max_length: int,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        seed: int,
        lora: LoraConfig | None,
    ):
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        full = _round_up(num_slots, parts)
        self.row_sizes = _sizes(full, steps=(4, 2, 1), least=_round_up(8, parts), multiple=parts)
        self._feed_rows = min(full, _round_up(16, parts))
        # A power of two, about an eighth of a session.
        self._feed_length = min(512, 1 << max(4, (max_length // 8).bit_length() - 1))
        self.column_sizes = _column_sizes(max(max_length, self._feed_length))
        self._programs = _programs(config, mesh, vocab_size, stop_ids, lora)
        self._no_experts = np.zeros((0, *config.routing_shape), np.int32)
        self._seed = seed
        self._lock = threading.Lock()
        self._cache: Any = None
        self._shape = 0, 0

    @property
    def num_compiled(self) -> int:
        return self._programs.num_compiled

    def place(self, params: nnx.State) -> nnx.State:
        """The parameters where the programs want them."""
        return jax.device_put(params, self._programs.param_shardings)

    def rows_for(self, sessions: int) -> int:
        """The smallest number of rows that holds so many sessions, or all there are."""
        return next((size for size in self.row_sizes if size >= sessions), self.row_sizes[-1])

    def run(self, params: nnx.State, work: Slice) -> Done:
        """Carries out one slice; numpy arrays out. One at a time, from whatever thread."""
        with self._lock:
            return self._run(params, work)

    def _run(self, params: nnx.State, work: Slice) -> Done:
        try:
            self._resize(work)
            prompts = self._read(params, work.prompts)
            self._copy(work.copies)
            readings = self._read(params, work.readings)
            columns_left = self._shape[1] - max(r.length for r in work.running)
            self._cache, decoded = self._programs.decode(
                params,
                self._cache,
                _rows(self._shape[0], work.running),
                self._seed,
                min(MAX_STEPS, columns_left),
                work.floor,
            )
            return Done(jax.tree.map(np.asarray, decoded), prompts, readings)
        except BaseException:
            # Half done, and perhaps donated to a program that failed: nothing in it can be used.
            self._cache, self._shape = None, (0, 0)
            raise

    def clear(self) -> None:
        """Forgets all rows."""
        with self._lock:
            self._cache, self._shape = None, (0, 0)

    def warm_up(self, params: nnx.State) -> None:
        """Compiles every program for every size."""
        for rows, columns in itertools.product(self.row_sizes, self.column_sizes):
            self._cache, self._shape = self._programs.empty(rows, columns), (rows, columns)
            self._read(params, [Reading(0, [0], 0)])
            self._copy([(0, 0)])
            self._cache, _ = self._programs.decode(
                params, self._cache, _rows(rows, []), self._seed, 0, 0
            )
            others = [(other, columns) for other in self.row_sizes]
            others += [(rows, other) for other in self.column_sizes if other > columns]
            for other_rows, other_columns in others:
                source_B = np.zeros(other_rows, np.int32)
                self._programs.resize(self._cache, source_B, other_columns)
        self.clear()

    def _resize(self, work: Slice) -> None:
        rows, columns = len(work.source), self._shape[1]
        fitting = next(size for size in self.column_sizes if size >= work.columns)
        if not work.keeps:
            if self._shape != (rows, fitting):
                self._cache = self._programs.empty(rows, fitting)
            self._shape = rows, fitting
            return
        if work.source != list(range(self._shape[0])):
            # A row that is new may name one that never was; what it holds does not matter.
            source_B = np.minimum(np.array(work.source, np.int32), self._shape[0] - 1)
            self._cache = self._programs.resize(self._cache, source_B, columns)
        if fitting > columns:
            columns = fitting
            self._cache = self._programs.resize(
                self._cache, np.arange(rows, dtype=np.int32), columns
            )
        self._shape = rows, columns

    def _read(self, params: nnx.State, readings: list[Reading]) -> list[np.ndarray]:
        """Feeds the readings, the longest first, so that rows of like length go together.

        Gives the experts that each reading's tokens took, i32[n, L, k] (see `Decoded`).
        """
        taken: list[list[np.ndarray]] = [[] for _ in readings]
        order = sorted(range(len(readings)), key=lambda r: -len(readings[r].ids))
        for i in range(0, len(order), self._feed_rows):
            numbers = order[i : i + self._feed_rows]
            together = [readings[number] for number in numbers]
            for offset in range(0, len(together[0].ids), self._feed_length):
                rows_R, starts_R, counts_R = np.zeros((3, self._feed_rows), np.int32)
                tokens_RT = np.zeros((self._feed_rows, self._feed_length), np.int32)
                for r, reading in enumerate(together):
                    ids = reading.ids[offset : offset + self._feed_length]
                    rows_R[r], starts_R[r] = reading.row, reading.start + offset
                    counts_R[r], tokens_RT[r, : len(ids)] = len(ids), ids
                self._cache, experts = self._programs.feed(
                    params, self._cache, rows_R, tokens_RT, starts_R, counts_R
                )
                if experts is not None:
                    experts_RTLk = np.asarray(experts)
                    for r, number in enumerate(numbers):
                        taken[number].append(experts_RTLk[r, : counts_R[r]])
        return [np.concatenate(x) if x else self._no_experts for x in taken]

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for i in range(0, len(copies), self._feed_rows):
            source_R = np.zeros(self._feed_rows, np.int32)
            # A target that does not exist is dropped.
            target_R = np.full(self._feed_rows, self._shape[0], np.int32)
            for r, (source, target) in enumerate(copies[i : i + self._feed_rows]):
                source_R[r], target_R[r] = source, target
            self._cache = self._programs.copy(self._cache, source_R, target_R)


@functools.lru_cache(maxsize=4)
def _programs(
    config: ModelConfig,
    mesh: Mesh,
    vocab_size: int,
    stop_ids: tuple[int, ...],
    lora: LoraConfig | None,
) -> Programs:
    """One for all engines of the same policy: a run's rollouts and its evaluations compile once."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    model = abstract_transformer(config)
    if lora is not None:
        model = adapted(model, lora)
    return Programs(model, mesh, vocab_size, stop_ids, separate=on_cpu)


def _rows(rows: int, running: list[Running]) -> Rows:
    """The state of all rows; those that do not run rest."""
    token, length, budget, top_k = np.zeros((4, rows), np.int32)
    request = np.zeros(rows, np.uint32)
    temperature, top_p = np.ones((2, rows), np.float32)
    for r in running:
        token[r.row], length[r.row], budget[r.row] = r.token, r.length, r.budget
        request[r.row] = r.request_id % 2**32
        temperature[r.row], top_k[r.row], top_p[r.row] = r.sampling
    return Rows(token, length, request, budget, SamplingParams(temperature, top_k, top_p))


def _column_sizes(max_length: int) -> tuple[int, ...]:
    """Up to a quarter each is 4 times the one before, for a model's longest row may be far longer
    than what is sampled; beyond, memory matters more than what one size more costs to compile."""
    steps: tuple[float, ...] = (4, 2, 4 / 3, 1) if max_length > 256 else (2, 1)
    while max_length >= 4 * _LEAST_OF_LONG * steps[0]:
        steps = 4 * steps[0], *steps
    return _sizes(max_length, steps, least=64, multiple=32)


def _sizes(full: int, steps: tuple[float, ...], least: int, multiple: int) -> tuple[int, ...]:
    """full / step for every step, rounded up to a multiple, at least `least` and at most `full`."""
    sizes = {min(full, max(least, _round_up(full / step, multiple))) for step in steps}
    return tuple(sorted(sizes))


def _round_up(number: float, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
