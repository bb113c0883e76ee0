"""A data file to its records, by its name: JSONL, JSON or Parquet.

Leaves each record with its place: `file:line`, or `file:row N`. Its data is what
`reading.json_object` takes: bytes of JSON, or what was read of it already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agentx.data.formats.parquet import rows
from agentx.data.formats.places import PathLike
from agentx.data.formats.reading import lines, values, whole

_JSON = (".json", ".traj")


def is_data_file(path: PathLike) -> bool:
    """Whether a file's name says that it holds records; any other is one text."""
    return _plain(path).endswith((*_JSON, ".jsonl", ".ndjson", ".parquet"))


def records(path: PathLike, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place.

    A .parquet file has a row a record; .json and .traj an array of them, one record, or, where it
    is InterCode's, an object of them; any other file a line a record. All but Parquet may be
    gzipped. Those that begin in one line of an array are numbered, so that each has its own place.
    columns: those of a Parquet file that are wanted, all where there are none.
    """
    if _plain(path).endswith(".parquet"):
        yield from rows(path, columns)
    elif not _plain(path).endswith(_JSON):
        yield from lines(path)
    else:
        first = next(values(path), None)
        if first is None:
            return
        _, key, value = first
        if not key or (isinstance(value, dict) and "turn_history" in value):
            last = ""
            for number, (place, _, value) in enumerate(values(path), start=1):
                yield (place if place != last else f"{place} (record {number})"), value
                last = place
        else:
            yield whole(path)


def _plain(path: PathLike) -> str:
    return str(path).removesuffix(".gz")
