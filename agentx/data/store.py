"""The token store: trajectories, tokenised once, on local disk as zarr arrays with a manifest.

Enters: trajectories, one after the other. Leaves: the same trajectories, by number, in any order.
The columns are one-dimensional zarr v3 arrays, written by TensorStore; any zarr library reads them:

    ids                                   i32[tokens]
    span_end, span_role, span_origin,     one entry a span; span_end counts tokens from the start of
    span_outcome                          the store
    token_end, span_stop, prompt_spans,   one entry a trajectory; where its tokens, spans and the
    reward, group, task_end               bytes of its task id end
    task                                  u8, the UTF-8 of the task ids

`manifest.json` is written last and in one step, so a folder without one is no store. It holds the
counts, the size and sha256 of every file, and the fingerprints of the inputs and of the tokenizer.

Not kept, because they belong to a rollout and not to data: logprobs, weight versions and `info`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory

FORMAT = 1
MANIFEST = "manifest.json"

# Entries of a column that are held in memory before they are written; the size of a chunk on disk.
_CHUNK = 1 << 18

_COLUMNS: dict[str, Any] = {
    "ids": np.int32,
    "span_end": np.int64,
    "span_role": np.uint8,
    "span_origin": np.uint8,
    "span_outcome": np.uint8,
    "token_end": np.int64,
    "span_stop": np.int64,
    "prompt_spans": np.int32,
    "reward": np.float32,
    "group": np.int64,
    "task_end": np.int64,
    "task": np.uint8,
}


class TokenStore:
    """A read-only sequence of trajectories. Columns are read into memory when it is opened.

    lengths: i64[len(store)], the number of tokens of each trajectory. num_tokens: their sum.
    fingerprint: sha256 over the files and the tokenizer's fingerprint: equal where all is equal.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], columns: dict[str, np.ndarray]):
        """Use `open` or `write`."""
        self.path, self.manifest = path, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._columns = columns
        self._token_start = _starts(columns["token_end"])
        self._span_start = _starts(columns["span_stop"])
        self._task_start = _starts(columns["task_end"])
        self.lengths = columns["token_end"] - self._token_start
        self.num_tokens = int(self.lengths.sum())

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        trajectories: Iterable[Trajectory],
        tokenizer_fingerprint: str,
        *,
        inputs_fingerprint: str = "",
    ) -> TokenStore:
        """Writes a new store and opens it. Trajectories are taken one by one, never all at once.

        What a writer that was killed left at `path` is replaced. Raises ValueError where `path`
        already holds a complete store or other files, and for a trajectory without tokens or no
        trajectory at all.
        """
        folder = Path(path)
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} already holds a store: delete it or write elsewhere")
        others = {p.name for p in folder.iterdir()} - {*_COLUMNS} if folder.is_dir() else set()
        if folder.is_file() or others - {MANIFEST + ".partial"}:
            raise ValueError(f"{folder} holds other things than a store: write elsewhere")
        for name in _COLUMNS:
            shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        writers = {name: _ColumnWriter(folder / name, dtype) for name, dtype in _COLUMNS.items()}
        for number, trajectory in enumerate(trajectories):
            _append(writers, trajectory, number)
        for writer in writers.values():
            writer.flush()
        if not writers["token_end"].length:
            raise ValueError(f"nothing to write to {folder}: the data set is empty")
        files = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for name in _COLUMNS
            for file in sorted((folder / name).rglob("*"))
            if file.is_file()
        }
        manifest = {
            "format": FORMAT,
            "num_trajectories": writers["token_end"].length,
            "num_spans": writers["span_end"].length,
            "num_tokens": writers["ids"].length,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "inputs_fingerprint": inputs_fingerprint,
            "files": files,
        }
        content = json.dumps([FORMAT, tokenizer_fingerprint, files], sort_keys=True)
        manifest["fingerprint"] = hashlib.sha256(content.encode()).hexdigest()
        partial = folder / (MANIFEST + ".partial")
        partial.write_text(json.dumps(manifest, indent=1))
        os.replace(partial, folder / MANIFEST)
        return cls.open(folder)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        tokenizer_fingerprint: str | None = None,
        *,
        inputs_fingerprint: str | None = None,
    ) -> TokenStore:
        """Opens a store, having checked every file against the manifest.

        Raises ValueError, in one sentence, where there is no complete store, a file is missing or
        changed, or it was written with another tokenizer or from other inputs than those given.
        """
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no complete token store: build it (again)") from None
        except ValueError:
            raise ValueError(f"{folder / MANIFEST} is damaged: build the store again") from None
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder} is a store of format {manifest.get('format')}, this is the code for "
                f"format {FORMAT}: build it again"
            )
        for what, key, asked in (
            ("with another tokenizer", "tokenizer_fingerprint", tokenizer_fingerprint),
            ("from other inputs", "inputs_fingerprint", inputs_fingerprint),
        ):
            found = manifest[key]
            if asked is not None and asked != found:
                raise ValueError(
                    f"{folder} was written {what} (fingerprint {found[:12]}, "
                    f"not {asked[:12]}): build it again"
                )
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise ValueError(f"{file} is missing: build the store again")
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                raise ValueError(f"{file} has changed since it was written: build the store again")
        reads = {name: _open_array(folder / name).read() for name in _COLUMNS}
        return cls(folder, manifest, {name: read.result() for name, read in reads.items()})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Trajectory:
        """The whole trajectory. Raises IndexError outside [0, len(store))."""
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of a store of {len(self)}")
        return self.piece(index, 0, int(self.lengths[index]))

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    @property
    def rewards(self) -> np.ndarray:
        """Of each trajectory, f32[len(store)]; NaN where nobody gave one."""
        return self._columns["reward"]

    def tokens_by_role(self) -> np.ndarray:
        """How many tokens have each role and outcome: i64[roles, outcomes]."""
        column = self._columns
        counts = np.zeros((len(Role), len(Outcome)), np.int64)
        lengths = np.diff(column["span_end"], prepend=0)
        np.add.at(counts, (column["span_role"], column["span_outcome"]), lengths)
        return counts

    def token_start(self, index: int) -> int:
        """How many tokens of the store come before this trajectory."""
        return int(self._token_start[index])

    def span_ends(self, index: int) -> np.ndarray:
        """Where the spans of a trajectory end, in tokens from its start: i64[spans]."""
        spans = slice(self._span_start[index], self._columns["span_stop"][index])
        return self._columns["span_end"][spans] - self._token_start[index]

    def piece(self, index: int, begin: int, end: int) -> Trajectory:
        """Tokens `begin` to `end` of a trajectory, in the spans (or parts of them) that hold them.

        The ids are views of the store's memory: copy before changing them.
        """
        column = self._columns
        first_span = int(self._span_start[index])
        start = int(self._token_start[index])
        ends = self.span_ends(index)
        low = int(np.searchsorted(ends, begin, side="right"))
        high = int(np.searchsorted(ends, end, side="left")) + 1
        own = slice(first_span + low, first_span + high)
        stops = np.minimum(ends[low:high], end).tolist()
        starts = [begin, *stops[:-1]]
        ids = column["ids"]
        spans = [
            Span(_ROLES[role], ids[start + a : start + b], _ORIGINS[origin], _OUTCOMES[outcome])
            for a, b, role, origin, outcome in zip(
                starts,
                stops,
                column["span_role"][own].tolist(),
                column["span_origin"][own].tolist(),
                column["span_outcome"][own].tolist(),
                strict=True,
            )
        ]
        task = column["task"][self._task_start[index] : column["task_end"][index]]
        prompt = int(column["prompt_spans"][index]) - low
        return Trajectory(
            spans,
            reward=float(column["reward"][index]),
            task_id=task.tobytes().decode(),
            group=int(column["group"][index]),
            num_prompt_spans=min(max(prompt, 0), len(spans)),
        )


# An enum's own constructor costs more than the rest of a span.
_ROLES, _ORIGINS, _OUTCOMES = list(Role), list(Origin), list(Outcome)


class _ColumnWriter:
    """One column on its way to disk: at most a chunk of it is in memory."""

    def __init__(self, path: Path, dtype: Any):
        self._array = _open_array(path, np.dtype(dtype))
        self._dtype, self._written = dtype, 0
        self._waiting: list[np.ndarray] = []
        self.length = 0

    def add(self, values: Any) -> None:
        self._waiting.append(np.asarray(values, self._dtype))
        self.length += len(self._waiting[-1])
        if self.length - self._written >= _CHUNK:
            self._write((self.length - self._written) // _CHUNK * _CHUNK)

    def flush(self) -> None:
        self._write(self.length - self._written)

    def _write(self, count: int) -> None:
        values = np.concatenate([np.zeros(0, self._dtype), *self._waiting])
        self._array = self._array.resize(exclusive_max=[self._written + count]).result()
        self._array[self._written : self._written + count].write(values[:count]).result()
        self._waiting = [values[count:]]
        self._written += count


def _append(writers: dict[str, _ColumnWriter], trajectory: Trajectory, number: int) -> None:
    spans = [span for span in trajectory.spans if len(span.ids)]
    if not spans:
        raise ValueError(f"trajectory {number} ({trajectory.task_id!r}) has no tokens")
    prompt = sum(len(s.ids) > 0 for s in trajectory.spans[: trajectory.num_prompt_spans])
    start = writers["ids"].length
    task = np.frombuffer(trajectory.task_id.encode(), np.uint8)
    writers["ids"].add(trajectory.ids)
    writers["span_end"].add(start + np.cumsum([len(s.ids) for s in spans]))
    writers["span_role"].add([s.role for s in spans])
    writers["span_origin"].add([s.origin for s in spans])
    writers["span_outcome"].add([s.outcome for s in spans])
    writers["task"].add(task)
    for name, value in (
        ("token_end", writers["ids"].length),
        ("span_stop", writers["span_end"].length),
        ("task_end", writers["task"].length),
        ("prompt_spans", prompt),
        ("reward", trajectory.reward),
        ("group", trajectory.group),
    ):
        writers[name].add([value])


def _open_array(path: Path, create_as: np.dtype[Any] | None = None) -> Any:
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    if create_as is None:
        return tensorstore.open(spec, read=True).result()
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
    ]
    spec["metadata"] = {
        "shape": [0],
        "data_type": create_as.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_CHUNK]}},
        "codecs": codecs,
    }
    return tensorstore.open(spec, create=True).result()


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
