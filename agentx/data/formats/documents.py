"""Documents of a path, whatever it holds: what `agentx data build` reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from agentx.data.formats.native import Conversation
from agentx.data.formats.places import (
    File,
    PathLike,
    find_files,
    is_folder,
    size_and_checksum,
)
from agentx.data.formats.reading import (
    OnError,
    ReadCounts,
    check_on_error,
    read_records,
)
from agentx.data.formats.records import is_data_file
from agentx.data.formats.registry import FORMATS, TEXT, read_as, sniff
from agentx.data.formats.texts import TextDocument, counted_out, read_texts, text_file

Document = TextDocument | Conversation

# What lies beside the records of a folder and is none of them.
_BESIDE = re.compile(r"(.*/)?(README|LICEN[CS]E|COPYING|NOTICE|CITATION)(\.\w+)?", re.IGNORECASE)


def read_documents(
    path: PathLike,
    *,
    format: str = "",
    field: str = "",
    trace: str = "",
    pattern: str = "*",
    on_error: OnError = "raise",
    counts: ReadCounts | None = None,
) -> Iterator[Document]:
    """The documents of a file, a folder or a glob, here or in a bucket, in order of path.

    Which they are: with `format` "text", each file is one. With another format, each file holds
    records of it; with `field`, of texts under that name, with reasoning under `trace`. Otherwise
    files of records (.jsonl, .ndjson, .json, .traj, .parquet) hold what their first records look
    like, and any other file is one text. A folder that holds other files than those of records is a
    tree of texts, all of it, unless a format or a field is named.

    pattern: of the names of files below a folder, "*.py" for instance. A folder's hidden files are
    skipped, and so are a README or LICENSE that lies beside nothing but records, and files of
    records without a record; all are counted.

    Raises ValueError for what cannot be read, in a sentence with file and line, and where nothing
    is kept at all.
    """
    _check(format, field, trace)
    check_on_error(on_error)
    counts = ReadCounts() if counts is None else counts
    before = dataclasses.replace(counts, skipped=counts.skipped.copy())
    files = find_files(path, pattern)
    is_tree = format == TEXT
    if not is_tree:
        files, is_tree = _told_apart(files, path)
        is_tree = is_tree and not format and not field
    for file in files:
        if counted_out(file, counts):
            continue
        read_before = counts.read
        if is_tree or not (format or field or is_data_file(file.path)):
            yield from read_records([file], text_file, on_error, counts)
        else:
            yield from _read_records(file, format, field, trace, on_error, counts)
        if counts.read == read_before:
            counts.read += 1
            counts.skipped["empty file"] += 1
    if counts.kept == before.kept:
        where = path if pattern == "*" else f"{path} ({pattern})"
        since = counts - before
        raise ValueError(f"{where} holds no document: the data set is empty: {since}")


def identify(path: PathLike, pattern: str = "*") -> list[tuple[str, int, str]]:
    """(path, size, checksum) of each file that `read_documents` would read, in its order.

    A README beside records is one of them. The checksum is sha256 for a file of this machine, and
    what the bucket keeps for one there.
    """
    files = (file for file in find_files(path, pattern) if not file.fault)
    return [(file.path, *size_and_checksum(file.path)) for file in files]


def _told_apart(files: list[File], path: PathLike) -> tuple[list[File], bool]:
    """Whether files are a tree of texts; if not, with a fault for what lies beside the records."""
    read = [file for file in files if not file.fault]
    texts = [file for file in read if not is_data_file(file.path)]
    if not texts or len(read) == 1 or not is_folder(path):
        return files, False
    if len(texts) < len(read) and all(_BESIDE.fullmatch(file.name) for file in texts):
        beside = {file.path for file in texts}
        return [
            file._replace(fault="beside records") if file.path in beside else file for file in files
        ], False
    return files, True


def _read_records(
    file: File, format: str, field: str, trace: str, on_error: OnError, counts: ReadCounts
) -> Iterator[Document]:
    """The documents of a file of records."""
    chosen = format or (TEXT if field else sniff(file.path))
    if chosen == TEXT:
        yield from read_texts(file.path, field or TEXT, trace, on_error, counts)
    else:
        yield from read_as(chosen, file.path, on_error, counts)


def _check(format: str, field: str, trace: str) -> None:
    if format and format != TEXT and format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; there are {TEXT}, {', '.join(FORMATS)}")
    if field and format:
        raise ValueError(
            f"field {field!r} is of texts in records, and the format {format!r} has none: "
            "name one of the two"
        )
    if trace and not field:
        raise ValueError(f"trace {trace!r} stands beside a text: name the field of the text too")
