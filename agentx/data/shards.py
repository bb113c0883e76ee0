"""One shard of a token store: trajectories as columns, and columns as zarr files.

    ids        i32[tokens]
    spans      i32[spans, 4]         where a span ends, in tokens from the start of the shard; its
                                     role, origin and outcome
    documents  i64[documents, 6]     where tokens, spans and bytes of the task id of a trajectory
                                     end; its spans of prompt, its group, the number of its source
    reward     f32[documents]
    task       u8[bytes]             the UTF-8 of the task ids

Every column is a zarr v3 array that any zarr library reads. Its chunks are small, so that a
document can be read without its neighbours, lie many to a file, and carry a checksum each. The same
trajectories give the same bytes, and a shard is named after them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from agentx.data.storage import Storage, wait
from agentx.trajectory import Trajectory

# Entries that are read together, and entries of one file.
CHUNK = 1 << 13
_FILE = 1 << 21

# dtype and, where a column has two dimensions, how many numbers an entry has.
COLUMNS: dict[str, tuple[str, int]] = {
    "ids": ("int32", 0),
    "spans": ("int32", 4),
    "documents": ("int64", 6),
    "reward": ("float32", 0),
    "task": ("uint8", 0),
}
TOKEN_END, SPAN_END, TASK_END, PROMPT_SPANS, GROUP, SOURCE = range(6)


class Entry(NamedTuple):
    """A trajectory and the number of the source that it came from."""

    trajectory: Trajectory
    source: int


def shard_columns(documents: Sequence[Entry]) -> dict[str, np.ndarray]:
    """The columns of these documents, each of which has tokens."""
    ids: list[np.ndarray] = []
    spans: list[tuple[int, int, int, int]] = []
    entries: list[tuple[int, ...]] = []
    task = bytearray()
    tokens = 0
    for trajectory, source in documents:
        prompt = 0
        for number, span in enumerate(trajectory.spans):
            if len(span.ids):
                tokens += len(span.ids)
                ids.append(span.ids)
                spans.append((tokens, span.role, span.origin, span.outcome))
                prompt += number < trajectory.num_prompt_spans
        task += trajectory.task_id.encode()
        entries.append((tokens, len(spans), len(task), prompt, trajectory.group, source))
    return {
        "ids": np.concatenate(ids).astype(np.int32),
        "spans": np.array(spans, np.int32),
        "documents": np.array(entries, np.int64),
        "reward": np.array([d.trajectory.reward for d in documents], np.float32),
        "task": np.frombuffer(bytes(task), np.uint8),
    }


def write_shard(storage: Storage, number: int, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes a shard's files and returns its entry in the manifest."""
    context = tensorstore.Context()
    memory = {"driver": "memory", "path": ""}
    for name, column in columns.items():
        spec = {**_create_spec(name, len(column)), "kvstore": {**memory, "path": f"{name}/"}}
        array = tensorstore.open(spec, create=True, context=context).result()
        if len(column):
            array.write(column).result()
    files = tensorstore.KvStore.open(memory, context=context).result()
    contents = {key.decode(): files[key] for key in sorted(files.list().result())}
    about = {
        key: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for key, data in contents.items()
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    name = f"shard-{number:05d}-{digest[:12]}"
    for key, data in contents.items():
        storage.write(f"{name}/{key}", data)
    return {
        "name": name,
        "trajectories": len(columns["documents"]),
        "spans": len(columns["spans"]),
        "tokens": len(columns["ids"]),
        "files": about,
    }


def open_column(storage: Storage, shard: str, column: str) -> Any:
    """A column of a shard as a TensorStore."""
    spec = {
        "driver": "zarr3",
        "kvstore": storage.array_spec(f"{shard}/{column}"),
        "fill_missing_data_reads": False,  # a file that is gone is an error, not zeros
    }
    return wait(tensorstore.open(spec, read=True), f"open {storage.name(shard)}/{column}")


def _create_spec(name: str, length: int) -> dict[str, Any]:
    dtype, width = COLUMNS[name]
    rest = [width] if width else []
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    if dtype == "uint8":
        little = {"name": "bytes"}
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    crc32c = {"name": "crc32c"}
    packed = {
        "chunk_shape": [CHUNK, *rest],
        "codecs": [little, zstd, crc32c],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, crc32c],
        # Not every server of buckets tells the last bytes of a file without its length.
        "index_location": "start",
    }
    return {
        "driver": "zarr3",
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [length, *rest],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_FILE, *rest]}},
            "codecs": [{"name": "sharding_indexed", "configuration": packed}],
        },
    }
