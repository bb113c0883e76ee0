"""Files to records, one by one, and the one loop that counts them.

Enters: a text file, JSONL (a record a line) or a JSON file (an array of records, an object of
records, or one record), plain or gzipped. Leaves: records with their place, `file:line`. What is in
memory at a time is one record, of at most `MAX_RECORD` bytes.

A record that cannot be read is an error in one sentence that names the place, or, where asked, is
skipped and counted by reason: `counts.read == counts.kept + counts.num_skipped`, always. A JSON
file that breaks off, or is no JSON somewhere, is an error even then: whatever follows is lost.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, TypeVar

from agentx.data.formats.places import PathLike, open_file

OnError = Literal["raise", "skip"]
T = TypeVar("T")

MAX_RECORD = 64 << 20
_PIECE = 1 << 20
_LONGEST_WORD = 16  # of JSON that a piece may cut: -Infinity, or an escape of two halves
_SPACE = re.compile(r"\s*")

# The reason under which records without text are counted.
EMPTY = "empty"

# What a file begins with that is no UTF-8, and what it is then.
_UTF8_MARK = b"\xef\xbb\xbf"
_BEGINNINGS = {
    b"\xff\xfe": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "gzip: call it .gz",
}


class Malformed(ValueError):
    """A record that cannot be read. `reason` is what it is counted under."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


@dataclasses.dataclass
class ReadCounts:
    """How many records a reader saw, how many it passed on, and why it left out the others."""

    read: int = 0
    kept: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def __sub__(self, before: ReadCounts) -> ReadCounts:
        """What came since."""
        kept, skipped = self.kept - before.kept, self.skipped - before.skipped
        return ReadCounts(self.read - before.read, kept, skipped)

    def __str__(self) -> str:
        """`12 records read = 10 kept + 2 skipped (1 empty, 1 no JSON)`."""
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.skipped.items()))
        return f"{self.read:,} records read = {self.kept:,} kept + {self.num_skipped:,} skipped" + (
            f" ({reasons})" if reasons else ""
        )


class Ids:
    """The ids of a file's records, to refuse one that comes twice; about 200 bytes an id."""

    def __init__(self) -> None:
        self._place_of: dict[bytes, str] = {}

    def check(self, given: Any, place: str) -> None:
        """Raises Malformed where another record has this id. None, "" and objects are no ids."""
        if given in (None, "") or isinstance(given, bool | dict | list):
            return
        key = hashlib.blake2b(repr(given).encode(errors="replace"), digest_size=12).digest()
        file, _, here = place.rpartition(":")
        if key in self._place_of:
            raise Malformed(
                f"{place}: its id {given!s:.99} is that of {file}:{self._place_of[key]} too; "
                "give each record its own, or skip such records",
                "duplicate id",
            )
        self._place_of[key] = here


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")


def read_records(
    records: Iterable[Any],
    parse: Callable[[Any], T | None],
    on_error: OnError,
    counts: ReadCounts,
) -> Iterator[T]:
    """What `parse` makes of each record. It returns None for one without text.

    Raises what `parse` raises, where `on_error` is not "skip".
    """
    for record in records:
        counts.read += 1
        try:
            document = parse(record)
        except Malformed as error:
            counts.skipped[error.reason] += 1
            if on_error == "raise":
                raise
            continue
        if document is None:
            counts.skipped[EMPTY] += 1
            continue
        counts.kept += 1
        yield document


def lines(path: PathLike) -> Iterator[tuple[str, bytes]]:
    """Each line with its place. One that is too long comes as its first `MAX_RECORD` + 1 bytes."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD + 1):
            number += 1
            shown = line.removeprefix(_UTF8_MARK) if number == 1 else line
            yield f"{path}:{number}", shown.rstrip(b"\r\n")
            while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(_PIECE)


def values(path: PathLike) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of each value in a JSON file's outermost array or object.

    The key is "" in an array. Raises ValueError, with the line, where the file is no such JSON or
    breaks off.
    """
    with _opened(path) as file:
        yield from _Values(file, str(path)).read()


def whole(path: PathLike) -> tuple[str, bytes]:
    """All of a file, with its path. Raises Malformed where it is longer than `MAX_RECORD`."""
    with _opened(path) as file:
        data = file.read(MAX_RECORD + 1)
    check_size(data, str(path))
    return str(path), data.removeprefix(_UTF8_MARK)


def check_size(data: bytes, place: str) -> None:
    """Raises Malformed where a record is longer than `MAX_RECORD`."""
    if len(data) > MAX_RECORD:
        raise too_long(place)


def too_long(place: str) -> Malformed:
    sentence = f"{place} is longer than {MAX_RECORD >> 20} MiB; cut it into parts, or skip it"
    return Malformed(sentence, "too long")


def decode(data: bytes, place: str) -> str:
    """UTF-8 as text. Raises Malformed, naming the byte."""
    check_size(data, place)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{data[error.start]:02x}; convert it, or skip such files"
        if data[:2] in _BEGINNINGS:
            found = f"it begins like {_BEGINNINGS[data[:2]]}"
        raise Malformed(f"{place} is not UTF-8: {found}", "not UTF-8") from None


def json_object(data: Any, place: str) -> dict[str, Any]:
    """A JSON object from its bytes, or a value that was read already. Raises Malformed.

    A record that its file could not give is the Malformed that says why.
    """
    if isinstance(data, Malformed):
        raise data
    record, text = data, ""
    if isinstance(data, bytes):
        text = decode(data, place)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise Malformed(
                f"{place}: this is no JSON: {error.msg} at column {error.colno}", "no JSON"
            ) from None
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{place}: this JSON is beyond reading: {error}", "no JSON") from None
    if not isinstance(record, dict):
        raise Malformed(f"{place}: this is no JSON object but a {kind(record)}", "no object")
    if not isinstance(data, bytes) or "\\u" in text:
        check_text(record, place)
    return record


def check_text(value: Any, place: str) -> None:
    """Raises Malformed where a string holds half of a character, as an escape can spell it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Malformed(f"{place}: a string has a lone surrogate", "lone surrogate") from None
    except RecursionError as error:
        raise Malformed(f"{place}: this JSON is beyond reading: {error}", "no JSON") from None


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


@contextlib.contextmanager
def _opened(path: PathLike) -> Iterator[IO[bytes]]:
    """A file opened for reading bytes, unzipped by its name; every fault is one sentence."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open_file(path))
            if str(path).endswith(".gz"):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            yield file
    except EOFError:
        raise Malformed(f"{path} breaks off: the gzip file is truncated", "damaged") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Malformed(f"{path} is damaged: {error}", "damaged") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


class _Values:
    """The values of one JSON file, read a piece at a time."""

    def __init__(self, file: IO[bytes], path: str):
        self._file, self._path = file, path
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def read(self) -> Iterator[tuple[str, str, Any]]:
        opening = self._next()
        if opening not in ("[", "{"):
            raise self._fault("there is no JSON array or object")
        closing, keyed = {"[": ("]", False), "{": ("}", True)}[opening]
        self._skip(1)
        if self._next() != closing:
            while True:
                self._next()
                place = f"{self._path}:{self._line}"
                key = self._key() if keyed else ""
                yield place, key, self._value()
                mark = self._next()
                if mark == closing:
                    break
                if mark != ",":
                    raise self._fault(f"this is no JSON: there is no ',' or {closing!r}")
                self._skip(1)
        self._skip(1)
        if self._next():
            raise self._fault("this is no JSON: something follows its end")

    def _key(self) -> str:
        key = self._value()
        if not isinstance(key, str) or self._next() != ":":
            raise self._fault("this is no JSON: there is no key with a ':'")
        self._skip(1)
        self._next()
        return key

    def _next(self) -> str:
        """The next character that is no space, where reading goes on; "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._skip(end - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        wanted = _PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end - self._at > MAX_RECORD:
                    raise self._too_long()
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._skip(end - self._at)
                    return value
            except json.JSONDecodeError as error:
                in_string = error.msg.startswith("Unterminated")  # its place is the first quote
                if self._ended or not (in_string or error.pos > len(self._text) - _LONGEST_WORD):
                    raise self._fault(f"this is no JSON: {error.msg}", error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._fault(f"this JSON is beyond reading: {error}") from None
            if len(self._text) - self._at > MAX_RECORD:
                raise self._too_long()
            # Twice as much each time: a long value is parsed anew only a few times.
            while len(self._text) - self._at < wanted and self._more():
                pass
            wanted = min(2 * wanted, MAX_RECORD + 1)

    def _more(self) -> bool:
        data = b"" if self._ended else self._file.read(_PIECE)
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._fault(f"this is not UTF-8: 0x{error.object[error.start]:02x}") from None
        self._text, self._at = self._text[self._at :] + text, 0
        self._ended = self._ended or not data
        return bool(data)

    def _skip(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def _too_long(self) -> ValueError:
        return self._fault(f"a record is longer than {MAX_RECORD >> 20} MiB")

    def _fault(self, what: str, at: int | None = None) -> ValueError:
        line = self._line + self._text.count("\n", self._at, self._at if at is None else at)
        if self._ended and (self._at if at is None else at) >= len(self._text.rstrip()):
            what = "the file breaks off here"
        return ValueError(f"{self._path}:{line}: {what}; nothing after it can be read")
