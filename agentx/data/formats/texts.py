"""Plain text: source trees, text files, records with a field of text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from agentx.data.formats.places import File, PathLike
from agentx.data.formats.reading import (
    Ids,
    Malformed,
    OnError,
    ReadCounts,
    decode,
    json_object,
    read_records,
    whole,
)
from agentx.data.formats.records import records
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Role, Span, Trajectory


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A text and where it came from: a path, or a file and line.

    trace: a reasoning trace that somebody wrote beside the text, "" where there is none.
    """

    name: str
    text: str
    trace: str = ""

    @property
    def num_characters(self) -> int:
        return len(self.text) + len(self.trace)


def counted_out(file: File, counts: ReadCounts) -> bool:
    """Whether a file is not to be read, which is counted by reason."""
    if file.fault:
        counts.read += 1
        counts.skipped[file.fault] += 1
    return bool(file.fault)


def text_file(file: File) -> TextDocument | None:
    """A file as one document, None where there is nothing in it. Raises Malformed."""
    text = decode(whole(file.path)[1], file.path)
    if "\0" in text:
        raise Malformed(
            f"{file.path} is no text: it has a byte 0 at {text.encode().index(0)}", "binary"
        )
    return TextDocument(file.name, text) if text.strip() else None


def read_texts(
    path: PathLike,
    field: str,
    trace: str,
    on_error: OnError,
    counts: ReadCounts,
) -> Iterator[TextDocument]:
    """One document for each record of a file, of the string under `field`.

    trace: a field beside it that holds a reasoning trace, or null. Raises ValueError for a record
    that has no such strings, naming file and line, and for an "id" that comes twice.
    """
    ids = Ids()

    def parse(line: tuple[str, object]) -> TextDocument | None:
        place, data = line
        if isinstance(data, bytes) and not data.strip():
            return None
        record = json_object(data, place)
        if not isinstance(record.get(field), str):
            raise Malformed(f"{place}: there is no string {field!r}", f"no string {field!r}")
        thought = record.get(trace, 0) if trace else ""
        if thought is not None and not isinstance(thought, str):
            raise Malformed(f"{place}: there is no string {trace!r}", f"no string {trace!r}")
        ids.check(record.get("id"), place)
        text = record[field]
        return TextDocument(place, text, thought or "") if text.strip() else None

    columns = [field, *([trace] if trace else [])]
    yield from read_records(records(path, columns), parse, on_error, counts)


def text_trajectory(document: TextDocument, tokenizer: Tokenizer) -> Trajectory:
    """One span: <|bos|>, the text, <|end|>; or two, with <|thought|> and the trace before the end.

    Its reward is NaN: nobody gave it one.
    """
    special = tokenizer.special
    bos, end = special["<|bos|>"], special["<|end|>"]
    if document.trace:
        ids = [bos, *tokenizer.encode(document.text)]
        thought = [special["<|thought|>"], *tokenizer.encode(document.trace), end]
        trace = [Span(Role.THOUGHT, np.array(thought, np.int32))]
    else:
        ids, trace = [bos, *tokenizer.encode(document.text), end], []
    spans = [Span(Role.TEXT, np.array(ids, np.int32)), *trace]
    markers = markers_of(tokenizer)
    return Trajectory(spans, reward=math.nan, task_id=document.name, markers=markers)


@functools.lru_cache(maxsize=1)
def markers_of(tokenizer: Tokenizer) -> Markers:
    """The ids of its markers; looked up once, which else would cost more than a short span."""
    return Markers.of(tokenizer.special)
