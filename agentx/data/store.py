"""The token store: trajectories, tokenised once, on local disk or in a bucket, and read at random.

    STORE/manifest.json          what is there; rewritten, in one step, after every shard
    STORE/shard-00000-HASH/      columns of its trajectories, see shards.py
    STORE/inputs.json            size and checksum of what it was made from, for whoever goes on
    STORE/plans/  taken/         row plans (plan.py), and what filters left out (prepare.py)

A `StoreWriter` writes shard after shard: whatever stops it (a signal, a full disk, a lost network),
the manifest names the shards that are complete, and a writer from the same inputs goes on behind
them. A `TokenStore` reads. It is opened for training only when it is complete, for part of a data
set is another data set; `partial=True` opens what there is.

The manifest has the counts, the size and sha256 of every file, and what the store was made from:
tokenizer, inputs and all else that its writer names. Chunks carry checksums, which every read
checks; `verify` reads everything and compares the files' own.

Not kept, because they belong to a rollout and not to data: logprobs, weight versions and `info`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from agentx.data.chunks import Chunks
from agentx.data.manifest import (
    FORMAT,
    MANIFEST,
    files_of,
    make_manifest,
    read_manifest,
    refuse_changes,
)
from agentx.data.shards import (
    GROUP,
    PROMPT_SPANS,
    SOURCE,
    SPAN_END,
    TASK_END,
    TOKEN_END,
    Entry,
    shard_columns,
    write_shard,
)
from agentx.data.storage import Changed, Storage, to_json
from agentx.trajectory import OUR_MARKERS, Markers, Outcome, Role, SpanTable, Trajectory

_INPUTS = "inputs.json"
_LOCK = "writer.lock"
# What else is in a store: shards, row plans (plan.py), what filters left out (prepare.py), and what
# workers of Beam leave (beam.py).
_OURS = re.compile(
    r"shard-\d{5,}-[0-9a-f]{12}/.+|plans/[0-9a-f]{32}\.npz|taken/\d{5,}\.jsonl|"
    r"entries/(\d{5,}|tally)\.json"
)

# Tokens of a shard, about: it ends with the document that reaches them. A writer holds one.
SHARD_TOKENS = 1 << 25

PathLike = str | os.PathLike[str]


class StoreWriter:
    """Writes a store, a shard at a time. Use it as a context, and call `finish` at the end.

    num_documents: what complete shards hold already: those documents are not to be added again.
    notes: what was noted of each complete shard. is_complete: whether there is nothing to be done.
    """

    def __init__(
        self,
        path: PathLike,
        tokenizer_fingerprint: str,
        *,
        made_from: dict[str, str] | None = None,
        inputs: dict[str, list[Any]] | None = None,
        sources: Sequence[str] = ("",),
        markers: Markers = OUR_MARKERS,
        shard_tokens: int = SHARD_TOKENS,
    ):
        """Begins a store, or goes on with one that was begun with the same arguments.

        made_from: what else the store depends on, by name. None where nobody can tell: then what
        another writer left is begun anew. inputs: of each input file, what tells that it has
        changed. sources: the names that documents refer to by number. markers: the tokenizer's.
        Raises ValueError where `path` holds a store that was begun otherwise, or a complete one
        that nobody can tell of, or other files, and where somebody else is writing to it.
        """
        self._storage = Storage(path)
        self._shard_tokens = shard_tokens
        self._about = {
            "format": FORMAT,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "markers": list(markers),
            "made_from": dict(made_from or {}),
            "sources": list(sources),
        }
        self._lock = _lock(self._storage)
        try:
            self._begin(None if made_from is None else inputs or {})
        except BaseException:
            self._unlock()
            raise
        self._waiting: list[Entry] = []
        self._waiting_tokens = 0
        self.num_documents = self._added = sum(s["trajectories"] for s in self._shards)
        self.notes: list[Any] = [shard["note"] for shard in self._shards]

    def _begin(self, inputs: dict[str, list[Any]] | None) -> None:
        """Finds the shards that are complete. inputs: None to begin anew."""
        storage = self._storage
        found, self._generation = read_manifest(storage)
        self._shards: list[dict[str, Any]] = []
        self.is_complete = found is not None and found["complete"]
        if self.is_complete and inputs is None:
            raise ValueError(f"{storage} already holds a store: delete it or write elsewhere")
        others = sorted(
            key
            for key in storage.list_keys() - {MANIFEST, _INPUTS, _LOCK}
            if not _OURS.fullmatch(key)
        )
        if others:
            raise ValueError(
                f"{storage} holds other things than a store, {others[0]} for one: write elsewhere"
            )
        if found is None or inputs is None or not found["shards"]:
            self._write_manifest([], is_complete=False, notes={})
            storage.write(_INPUTS, to_json(inputs or {}))
            for folder in ("taken", "entries"):  # of a writer that got to no shard
                storage.delete_below(folder)
        else:
            before, _ = storage.read(_INPUTS)
            refuse_changes(storage, found, self._about, json.loads(before or b"{}"), inputs)
            self._shards = found["shards"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A writer that is stopped before its first shard leaves no store behind.

        What filters left out stays, for it says why a store is empty.
        """
        with contextlib.suppress(OSError, Changed):
            if error is not None and not self._shards:
                self._storage.write(MANIFEST, None, if_equal=self._generation)
                self._storage.write(_INPUTS, None)
        self._unlock()

    @property
    def num_shards(self) -> int:
        """How many are complete."""
        return len(self._shards)

    @property
    def is_full(self) -> bool:
        """Whether what was added is enough for a shard."""
        return self._waiting_tokens >= self._shard_tokens

    def add(self, trajectory: Trajectory, source: int = 0) -> None:
        """The next document. Raises ValueError for one without tokens."""
        if not len(trajectory):
            raise ValueError(f"trajectory {self._added} ({trajectory.task_id!r}) has no tokens")
        self._added += 1
        self._waiting.append(Entry(trajectory, source))
        self._waiting_tokens += len(trajectory)

    def write_shard(self, note: Any = None) -> None:
        """Writes what was added as a shard. note: kept with it, for whoever goes on behind it.

        Raises OSError where it can't be written, which says how much of the store is complete.
        """
        columns, number = shard_columns(self._waiting), len(self._shards)
        self.add_shard(self._guarded(lambda: write_shard(self._storage, number, columns)), note)
        self._waiting, self._waiting_tokens = [], 0

    def add_shard(self, entry: dict[str, Any], note: Any = None) -> None:
        """The next shard, which was written already (`write_shard` of shards.py)."""
        self._write_manifest([*self._shards, {**entry, "note": note}], is_complete=False, notes={})

    def finish(self, note: Any = None, **notes: Any) -> TokenStore:
        """Writes what is left and marks the store as complete. notes: more for the manifest."""
        if not self.is_complete:
            if self._waiting:
                self.write_shard(note)
            if not self._shards:
                raise ValueError(f"nothing to write to {self._storage}: the data set is empty")
            self._write_manifest(self._shards, is_complete=True, notes=notes)
            self._delete_other_shards()
        return TokenStore.open(self._storage.path)

    def _delete_other_shards(self) -> None:
        """Deletes what writers were at that stopped.

        Not before the store is complete: until then another one may be writing them to a bucket.
        """
        found = {key.split("/")[0] for key in self._storage.list_keys()}
        others = found - {shard["name"] for shard in self._shards}
        for folder in sorted(others):
            if folder.startswith("shard-"):
                self._storage.delete_below(folder)

    def _write_manifest(
        self, shards: list[dict[str, Any]], *, is_complete: bool, notes: dict[str, Any]
    ) -> None:
        """Has the manifest name these shards, and goes on from them."""
        made = make_manifest(self._about, shards, is_complete=is_complete, notes=notes)
        try:
            self._generation = self._guarded(
                lambda: self._storage.write(MANIFEST, to_json(made), if_equal=self._generation)
            )
        except Changed:
            raise ValueError(
                f"{self._storage} is being written by somebody else too: this writer stops"
            ) from None
        self._shards = shards

    def _guarded(self, write: Any) -> Any:
        try:
            return write()
        except OSError as error:
            done = len(self._shards)
            raise OSError(
                f"{error}; {self._storage} holds {done} complete shard{'s' * (done != 1)}: run the "
                "same command again to go on"
            ) from None

    def _unlock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._lock.name)
            self._lock.close()
            self._lock = None


class TokenStore:
    """A read-only sequence of trajectories.

    In memory are 116 bytes a trajectory, and up to a gigabyte of the chunks that were read last.

    lengths: i64[len(store)], the number of tokens of each trajectory. num_tokens: their sum.
    fingerprint: sha256 over the files' own and the tokenizer's: equal where all is equal.
    sources: the names of the sources. source_of: i64[len(store)], the number of each document's.
    """

    def __init__(self, storage: Storage, manifest: dict[str, Any]):
        """Use `open` or `write`."""
        self.path, self.manifest = storage.path, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.sources: list[str] = manifest["sources"]
        self.markers = Markers(*manifest["markers"])
        self._storage = storage
        self._shards = [shard["name"] for shard in manifest["shards"]]
        self._chunks = Chunks(storage, self._shards)
        every = [self._chunks.whole(shard, "documents") for shard in range(len(self._shards))]
        rewards = [self._chunks.whole(shard, "reward") for shard in range(len(self._shards))]
        self.rewards = np.concatenate([np.zeros(0, np.float32), *rewards])
        """Of each trajectory, f32[len(store)]; NaN where nobody gave one."""
        self._first = np.cumsum([0, *map(len, every)])  # document of each shard
        self._end = np.concatenate([np.zeros((0, 6), np.int64), *every])
        self._start = np.zeros_like(self._end)  # of tokens, spans and task ids, in their shard
        self._start[1:] = self._end[:-1]
        self._start[self._first[:-1]] = 0
        self.lengths = self._end[:, TOKEN_END] - self._start[:, TOKEN_END]
        self.num_tokens = int(self.lengths.sum())
        self._token_start = np.cumsum(self.lengths) - self.lengths
        self.source_of = self._end[:, SOURCE]

    @classmethod
    def write(
        cls,
        path: PathLike,
        trajectories: Iterable[Trajectory],
        tokenizer_fingerprint: str,
    ) -> TokenStore:
        """Writes a new store and opens it. Trajectories are taken one by one, never all at once.

        What a writer that was killed left at `path` is replaced. Raises ValueError where `path`
        already holds a complete store or other files, and for a trajectory without tokens or no
        trajectory at all.
        """
        with StoreWriter(path, tokenizer_fingerprint) as writer:
            for trajectory in trajectories:
                writer.add(trajectory)
                if writer.is_full:
                    writer.write_shard()
            return writer.finish()

    @classmethod
    def open(
        cls,
        path: PathLike,
        tokenizer_fingerprint: str | None = None,
        *,
        partial: bool = False,
    ) -> TokenStore:
        """Opens a store, having looked for every file that the manifest names.

        partial: open the complete shards of a store that isn't, too. Raises ValueError, in one
        sentence, where there is no complete store, a file is missing or has another size, or it was
        written with another tokenizer than the one given.
        """
        storage = Storage(path)
        manifest = read_manifest(storage)[0]
        if manifest is None:
            raise ValueError(f"{storage} holds no token store: build it")
        if not manifest["complete"] and not partial:
            raise ValueError(
                f"{storage} is not complete: it holds {manifest['num_trajectories']} documents so "
                "far; run what builds it again"
            )
        found = manifest["tokenizer_fingerprint"]
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != found:
            raise ValueError(
                f"{storage} was written with another tokenizer (fingerprint {found[:12]}, "
                f"not {tokenizer_fingerprint[:12]}): build it again"
            )
        keys = storage.list_keys()
        for key, expected in files_of(manifest):
            if key not in keys:
                raise ValueError(f"{storage.name(key)} is missing: build the store again")
            if storage.size(key) not in (None, expected["bytes"]):
                raise ValueError(f"{storage.name(key)} has another size: build the store again")
        return cls(storage, manifest)

    def verify(self) -> None:
        """Reads every file. Raises ValueError for the first that is not what was written."""
        for key, expected in files_of(self.manifest):
            data, _ = self._storage.read(key)
            if data is None or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise ValueError(
                    f"{self._storage.name(key)} has changed since it was written: "
                    "build the store again"
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Trajectory:
        """The whole trajectory. Raises IndexError outside [0, len(store))."""
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of a store of {len(self)}")
        return self.piece(index, 0, int(self.lengths[index]))

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def tokens_by_role(self) -> np.ndarray:
        """How many tokens have each source, role and outcome: i64[sources, roles, outcomes]."""
        counts = np.zeros((len(self.sources), len(Role), len(Outcome)), np.int64)
        for shard, first in enumerate(self._first[:-1]):
            spans = self._chunks.whole(shard, "spans")
            own = slice(first, self._first[shard + 1])
            per_document = self._end[own, SPAN_END] - self._start[own, SPAN_END]
            source = np.repeat(self.source_of[own], per_document)
            lengths = np.diff(spans[:, 0], prepend=0)
            np.add.at(counts, (source, spans[:, 1], spans[:, 3]), lengths)
        return counts

    def token_start(self, index: int) -> int:
        """How many tokens of the store come before this trajectory."""
        return int(self._token_start[index])

    def span_ends(self, index: int) -> np.ndarray:
        """Where the spans of a trajectory end, in tokens from its start: i32[spans]."""
        shard, (start, end) = self._shard_of(index), self._range(index, SPAN_END)
        spans = self._chunks.read([(shard, "spans", start, end)])[0]
        ends: np.ndarray = spans[:, 0] - np.int32(self._start[index, TOKEN_END])
        return ends

    def piece(self, index: int, begin: int, end: int) -> Trajectory:
        """Tokens `begin` to `end` of a trajectory, in the spans (or parts of them) that hold them.

        The ids are views of the store's memory: copy before changing them.
        """
        return self.pieces([(index, begin, end)])[0]

    def pieces(self, wanted: Sequence[tuple[int, int, int]]) -> list[Trajectory]:
        """`piece` of each (index, begin, end), read from disk side by side."""
        ranges = []
        for index, begin, end in wanted:
            shard, start = self._shard_of(index), int(self._start[index, TOKEN_END])
            ranges.append((shard, "spans", *self._range(index, SPAN_END)))
            ranges.append((shard, "ids", start + begin, start + end))
            ranges.append((shard, "task", *self._range(index, TASK_END)))
        found = iter(self._chunks.read(ranges))
        return [
            self._piece(index, begin, end, next(found), next(found), next(found))
            for index, begin, end in wanted
        ]

    def _piece(
        self, index: int, begin: int, end: int, spans: np.ndarray, ids: np.ndarray, task: np.ndarray
    ) -> Trajectory:
        ends = spans[:, 0] - np.int32(self._start[index, TOKEN_END])
        low = int(np.searchsorted(ends, begin, side="right"))
        high = int(np.searchsorted(ends, end, side="left")) + 1
        columns = spans[low:high, 1:].T.astype(np.uint8)
        prompt = int(self._end[index, PROMPT_SPANS]) - low
        return Trajectory(
            SpanTable(ids, np.minimum(ends[low:high], end) - begin, *columns),
            reward=float(self.rewards[index]),
            task_id=task.tobytes().decode(),
            group=int(self._end[index, GROUP]),
            num_prompt_spans=min(max(prompt, 0), columns.shape[1]),
            markers=self.markers,
        )

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _range(self, index: int, column: int) -> tuple[int, int]:
        return int(self._start[index, column]), int(self._end[index, column])


def _lock(storage: Storage) -> IO[str] | None:
    """Holds a local folder for this process, as long as it lives.

    In a bucket two writers are told apart only when the manifest is written.
    """
    if not storage.is_local:
        return None
    folder = Path(storage.path)
    if folder.is_file():
        raise ValueError(f"{storage} holds other things than a store: write elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ValueError(f"{storage} is being written by process {owner}: wait for it") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
