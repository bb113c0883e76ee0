"""Which piece of which document stands in which row: planned once, kept beside the store.

Enters: a store, an objective (for the room that it asks for) and the length of rows. Leaves: a
`Plan`. Only documents longer than a row are cut, at borders of spans. Rows are filled best fit, the
longest pieces first; where that leaves too much room, because the pieces are all long, the emptiest
rows are dissolved into it. Nothing is left out but documents of one token, which have nothing to
predict; those are counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from agentx.data.objectives import Objective
from agentx.data.pack import best_fit
from agentx.data.storage import Storage
from agentx.data.store import TokenStore

# It changes with the way in which rows are planned, so that a plan of another way is not taken.
_VERSION = 3
# Rows are dissolved until they are as full as this.
_FULL = 0.985
# No shorter piece is made to fill a row: it would see too little of what came before.
_LEAST = 64
# Documents whose room is asked for together, and so read together.
_TOGETHER = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces of which trajectories stand in which row of `length` places.

    Row r holds the pieces `row_start[r]` to `row_start[r + 1]`; piece p is tokens `begin[p]` to
    `end[p]` of trajectory `document[p]`. All i64. num_split: trajectories longer than a row, which
    were cut. num_short: trajectories of one token, which have nothing to predict and are left out.
    fill: the share of all places that hold a token or are reserved for one. fingerprint: equal
    where the plan is.
    """

    fingerprint: str
    length: int
    row_start: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    num_split: int
    num_short: int
    fill: float

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1

    @property
    def num_targets(self) -> int:
        """Tokens that the rows predict, before an objective adds some."""
        return int((self.end - self.begin - 1).sum())

    def __str__(self) -> str:
        """`12 rows of 4096 tokens, 99.1 % full; 3 documents are cut, into 7 pieces`."""
        pieces = len(self.document) - len(np.unique(self.document)) + self.num_split
        cut = f"; {self.num_split:,} documents are cut, into {pieces:,} pieces"
        short = f"; {self.num_short:,} of one token are left out" if self.num_short else ""
        return (
            f"{self.num_rows:,} rows of {self.length} tokens, {100 * self.fill:.1f} % full"
            f"{cut if self.num_split else ''}{short}"
        )

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, begin, end) of each piece of a row."""
        own = slice(self.row_start[row], self.row_start[row + 1])
        columns = (self.document[own], self.begin[own], self.end[own])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def save(self) -> bytes:
        """The plan as the bytes of an .npz file."""
        file = io.BytesIO()
        np.savez_compressed(file, **dataclasses.asdict(self))
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Plan:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            fields = {f.name: found[f.name] for f in dataclasses.fields(cls)}
        return cls(**{k: v.item() if v.ndim == 0 else v for k, v in fields.items()})


def plan_of(store: TokenStore, objective: Objective, length: int) -> Plan:
    """The plan that is kept beside the store, or a new one, which then is.

    Where the store can't be written to, a line on stderr says that it is not kept.
    """
    fingerprint = _fingerprint(store, objective, length)
    storage, key = Storage(store.path), f"plans/{fingerprint[:32]}.npz"
    data, _ = storage.read(key)
    if data is not None:
        try:
            plan = Plan.load(data)
        except Exception as error:  # whatever numpy says of bytes that are no plan
            raise ValueError(f"{storage.name(key)} is damaged ({error}): delete it") from None
        if plan.fingerprint == fingerprint:
            return plan
    plan = plan_rows(store, objective, length)
    try:
        storage.write(key, plan.save())
    except OSError as error:
        print(f"the plan of {store.path} is not kept: {error}", file=sys.stderr)
    return plan


def _fingerprint(store: TokenStore, objective: Objective, length: int) -> str:
    # The room that an objective asks for may depend on what is in its pools.
    pools = pools_of(store, objective)
    content = repr((_VERSION, store.fingerprint, objective, pools, length))
    return hashlib.sha256(content.encode()).hexdigest()


def pools_of(store: TokenStore, objective: Objective) -> dict[str, str]:
    """The fingerprint, by path, of each store that an objective, or one in it, draws from.

    Raises ValueError for one that is not of the tokenizer of `store`.
    """
    tokenizer: str = store.manifest["tokenizer_fingerprint"]
    return {path: TokenStore.open(path, tokenizer).fingerprint for path in _paths_in(objective)}


def _paths_in(objective: Any) -> Iterator[str]:
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if field.name in ("pool", "store") and value:
            yield value
        for inner in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(inner):
                yield from _paths_in(inner)


class _Piece(NamedTuple):
    """Tokens `begin` to `end` of a document, the room reserved, and whether more is elsewhere."""

    document: int
    begin: int
    end: int
    room: int
    is_cut: bool

    @property
    def size(self) -> int:
        """The places that it takes: the first token is an input only."""
        return self.end - self.begin - 1 + self.room


def plan_rows(store: TokenStore, objective: Objective, length: int) -> Plan:
    """Packs a store into rows, best fit, each trajectory whole unless it is longer than a row.

    A longer one is cut at the last border of spans that fits, or, within a span longer than a row,
    anywhere. Each piece begins with the last token of the one before, so that every token but the
    first is predicted once. Raises ValueError where nothing is left to predict.
    """
    pieces: list[_Piece] = []
    num_split = num_short = 0
    for document, room in enumerate(_rooms(store, objective)):
        tokens = int(store.lengths[document])
        if room >= length:
            raise ValueError(f"the objective reserves {room} places in rows of {length}")
        if tokens < 2:
            num_short += 1
            continue
        cuts = _cuts(tokens, store.span_ends(document), length - room)
        num_split += len(cuts) > 1
        pieces += [_Piece(document, begin, end, room, len(cuts) > 1) for begin, end in cuts]
    if not pieces:
        raise ValueError(f"{store.path} has no trajectory of more than one token")
    bins = best_fit([piece.size for piece in pieces], length)
    rows = _dissolve([[pieces[i] for i in chosen] for chosen in bins], store, length)
    order = [piece for row in rows for piece in row]
    document, begin, end = np.array([piece[:3] for piece in order], np.int64).T
    row_start = np.cumsum([0, *map(len, rows)])
    fill = sum(piece.size for piece in order) / (len(rows) * length)
    fingerprint = _fingerprint(store, objective, length)
    return Plan(fingerprint, length, row_start, document, begin, end, num_split, num_short, fill)


def _dissolve(rows: list[list[_Piece]], store: TokenStore, length: int) -> list[list[_Piece]]:
    """The rows, with the emptiest taken apart to fill the others up to `_FULL`.

    Only pieces of documents that are cut anyway are cut again. A row that can't be taken apart
    whole stays as it is.
    """
    sizes = [sum(piece.size for piece in row) for row in rows]
    total, left = sum(sizes), len(rows)
    # Rows by the room that they have: (-room, row). An entry whose room has changed is passed over.
    rooms = [(size - length, number) for number, size in enumerate(sizes)]
    heapq.heapify(rooms)
    for number in np.argsort(sizes, kind="stable").tolist():
        if total >= _FULL * left * length:
            break
        if not all(piece.is_cut for piece in rows[number]):
            continue
        moved = _scatter(rows[number], number, rooms, sizes, store, length)
        if moved is None:
            continue
        total += sum(piece.size for piece, _ in moved) - sizes[number]
        left -= 1
        rows[number], sizes[number] = [], length  # no room: nothing moves in
        for piece, row in moved:
            rows[row] = [*rows[row], piece]
    return [row for row in rows if row]


def _scatter(
    pieces: list[_Piece],
    own: int,
    rooms: list[tuple[int, int]],
    sizes: list[int],
    store: TokenStore,
    length: int,
) -> list[tuple[_Piece, int]] | None:
    """Parts of the pieces and the rows that they fit into, or None where some do not.

    Takes the room from `rooms` and `sizes`, unless it returns None.
    """
    moved: list[tuple[_Piece, int]] = []
    popped: list[tuple[int, int]] = []
    before: dict[int, int] = {}
    for piece in pieces:
        ends = store.span_ends(piece.document)
        begin = piece.begin
        while begin < piece.end - 1:
            room, row = 0, own
            while rooms and (row == own or sizes[row] - length != room):
                room, row = heapq.heappop(rooms)
                popped.append((room, row))
            end = min(begin + 1 - room - piece.room, piece.end)
            if end < piece.end:
                border = int(np.searchsorted(ends, end, side="right"))
                end = int(ends[border - 1]) if border else begin  # none: it can't be moved
            if row == own or end - begin < min(_LEAST, piece.end - begin):
                for number, size in before.items():
                    sizes[number] = size
                for entry in popped:
                    heapq.heappush(rooms, entry)
                return None
            assert end - begin > 1, "a part of one token predicts nothing and leaves as much to do"
            part = piece._replace(begin=begin, end=end)
            moved.append((part, row))
            before.setdefault(row, sizes[row])
            sizes[row] += part.size
            heapq.heappush(rooms, (sizes[row] - length, row))
            begin = end - 1
    return moved


def _rooms(store: TokenStore, objective: Objective) -> Iterator[int]:
    """What the objective asks for, of each document."""
    for first in range(0, len(store), _TOGETHER):
        together = range(first, min(first + _TOGETHER, len(store)))
        whole = [(document, 0, int(store.lengths[document])) for document in together]
        yield from map(objective.room, store.pieces(whole))


def _cuts(tokens: int, span_ends: np.ndarray, places: int) -> list[tuple[int, int]]:
    """Where to cut a trajectory so that no piece takes more than `places` places."""
    cuts: list[tuple[int, int]] = []
    begin = 0
    while True:
        end = begin + places + 1
        if end >= tokens:
            return [*cuts, (begin, tokens)]
        border = int(span_ends[np.searchsorted(span_ends, end, side="right") - 1])
        if begin + 1 < border <= end:
            end = border
        cuts.append((begin, end))
        begin = end - 1
