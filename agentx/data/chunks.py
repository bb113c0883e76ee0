"""The columns of a store's shards, read a chunk at a time; those read last stay in memory."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentx.data.shards import CHUNK, COLUMNS, open_column
from agentx.data.storage import Damaged, Storage, wait

# What a reader keeps of chunks in memory.
_CACHE_BYTES = 1 << 30


class Chunks:
    """The chunks of all columns, decoded; those that were read last stay in memory."""

    def __init__(self, storage: Storage, shards: Sequence[str]):
        self._storage, self._shards = storage, shards
        self._columns: dict[tuple[int, str], Any] = {}
        self._kept: collections.OrderedDict[tuple[int, str, int], np.ndarray]
        self._kept = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def whole(self, shard: int, column: str) -> np.ndarray:
        """All of a column, past the memory of chunks."""
        array = self._column(shard, column)
        return self._read(array.read(), shard, column)

    def read(self, ranges: Sequence[tuple[int, str, int, int]]) -> list[np.ndarray]:
        """Entries `begin` to `end` of a column of a shard, for each range. Not to be written to."""
        with self._lock:
            waiting = {}
            needed = {
                (shard, column, number): None
                for shard, column, begin, end in ranges
                for number in range(begin // CHUNK, -(-end // CHUNK))
            }
            for key in needed:
                if key in self._kept:
                    self._kept.move_to_end(key)
                else:
                    shard, column, number = key
                    array = self._column(shard, column)
                    stop = min((number + 1) * CHUNK, array.shape[0])
                    waiting[key] = array[number * CHUNK : stop].read()
            held = {key: self._kept[key] for key in needed if key in self._kept}
            for key, future in waiting.items():
                held[key] = self._keep(key, self._read(future, *key[:2]))
        return [self._cut(held, *given) for given in ranges]

    @staticmethod
    def _cut(
        held: dict[tuple[int, str, int], np.ndarray], shard: int, column: str, begin: int, end: int
    ) -> np.ndarray:
        first, last = begin // CHUNK, (end - 1) // CHUNK
        if end <= begin:
            dtype, width = COLUMNS[column]
            return np.zeros((0, width) if width else 0, dtype)
        if first == last:
            return held[shard, column, first][begin - first * CHUNK : end - first * CHUNK]
        parts = np.concatenate([held[shard, column, n] for n in range(first, last + 1)])
        return parts[begin - first * CHUNK : end - first * CHUNK]

    def _keep(self, key: tuple[int, str, int], chunk: np.ndarray) -> np.ndarray:
        self._kept[key] = chunk
        self._bytes += chunk.nbytes
        while self._bytes > _CACHE_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
        return chunk

    def _column(self, shard: int, column: str) -> Any:
        if (shard, column) not in self._columns:
            opened = open_column(self._storage, self._shards[shard], column)
            self._columns[shard, column] = opened
        return self._columns[shard, column]

    def _read(self, future: Any, shard: int, column: str) -> np.ndarray:
        name = self._storage.name(f"{self._shards[shard]}/{column}")
        try:
            found: np.ndarray = wait(future, f"read {name}")
        except Damaged as error:
            raise ValueError(
                f"{name} is damaged or gone ({error}): build the store again"
            ) from None
        return found
