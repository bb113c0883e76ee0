"""Exact and near duplicates: by a hash of the text, and by MinHash with banding (datasketch's).

Which documents are duplicates is a question about pairs: a document is taken where an *earlier*
one, taken itself or not, has the same text, or shares a band with it and is as similar as asked. So
the answer depends on the order of documents alone, never on how they are split over processes:

    signature(document)                             each document by itself
    keys(signature)                                 what to group them by
    pairs_in(numbered signatures of one group)      each group by itself
    min(pairs of one document)                      the pair that it is reported with

`DuplicateIndex` is the same on one machine, document after document.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from agentx.data.curate.base import (
    Document,
    library,
    ngrams_of,
    text_of,
    text_of_messages,
    words,
)
from agentx.data.formats import TextDocument

EXACT, NEAR = "exact duplicate", "near duplicate"

_SEED = 1  # of the permutations: signatures of one run are compared with those of another
_HASHED_AT_A_TIME = 4096  # n-grams: each takes num_permutations values in memory
_COMPARED_AT_A_TIME = 64  # documents


class Signature(NamedTuple):
    """What is compared of a document.

    exact: 16 bytes, the hash of all its text. values: its MinHash, u32[num_permutations] as bytes,
    little-endian; none where the document has no word.
    """

    exact: bytes
    values: bytes


class Pair(NamedTuple):
    """A document and an earlier one that it duplicates, by their places in the order.

    The first of several in order is reported: exact before near, then the earliest.
    """

    number: int
    is_near: bool
    first: int
    similarity: float

    @property
    def reason(self) -> str:
        return NEAR if self.is_near else EXACT


@dataclasses.dataclass(frozen=True)
class Deduplicate:
    """How near duplicates are told: MinHash over n-grams of words (Broder 1997), and its bands.

    Two documents are near duplicates where they share a band of their MinHashes and these agree in
    `threshold` of their values or more, which estimates the share of n-grams that they have in
    common, to about 0.04. How many bands there are, and how wide they are, is datasketch's choice
    for the threshold. Words are as `words` says. Of a conversation, near duplicates are told by
    what user and assistant say and call: the system's text is that of all runs of an agent, and a
    long result of a tool may be that of many. With ngram=2 and threshold=0.5:

        the cat sat on the mat          kept
        the cat sat on the mat          taken: exact duplicate of the first
        The cat sat on the mat, then    taken: near duplicate of the first, similarity 0.80
        a dog ran off                   kept
    """

    threshold: float = 0.8
    ngram: int = 5
    num_permutations: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"Deduplicate.threshold is {self.threshold}; it is over 0 and at most 1"
            )
        if self.ngram < 1:
            raise ValueError(f"Deduplicate.ngram is {self.ngram}; it is 1 or more words")
        if self.num_permutations < 2:
            raise ValueError(
                f"Deduplicate.num_permutations is {self.num_permutations}; it is 2 or more"
            )

    def signature(self, document: Document) -> Signature:
        """The same in any process. Raises ValueError where datasketch is not installed."""
        exact = hashlib.blake2b(text_of(document).encode(), digest_size=16).digest()
        found = words(_compared(document))
        if not found:
            return Signature(exact, b"")
        ngrams = list(set(ngrams_of(found, min(self.ngram, len(found)))))
        minhash = _empty_minhash(self.num_permutations).copy()
        for at in range(0, len(ngrams), _HASHED_AT_A_TIME):
            minhash.update_batch([ngram.encode() for ngram in ngrams[at : at + _HASHED_AT_A_TIME]])
        return Signature(exact, minhash.hashvalues.astype("<u4").tobytes())

    def keys(self, signature: Signature) -> list[bytes]:
        """Documents that share none of these are no duplicates: one for the text, one a band."""
        keys = [b"=" + signature.exact]
        if signature.values:
            num_bands, width = _bands(self.threshold, self.num_permutations)
            for band in range(num_bands):
                piece = signature.values[4 * width * band : 4 * width * (band + 1)]
                told = band.to_bytes(2, "little") + piece
                keys.append(hashlib.blake2b(told, digest_size=8).digest())
        return keys

    def compare(self, number: int, later: Signature, first: int, earlier: Signature) -> Pair | None:
        """The pair of two documents that share a key, where they are duplicates."""
        if later.exact == earlier.exact:
            return Pair(number, False, first, 1.0)
        if not later.values or not earlier.values:
            return None
        similarity = float(_similarities(later.values, [earlier.values])[0])
        return Pair(number, True, first, similarity) if similarity >= self.threshold else None

    def pairs_in(self, group: Iterable[tuple[int, Signature]]) -> Iterator[Pair]:
        """Of documents that share one key, each with the first earlier one that it duplicates."""
        earlier: list[tuple[int, Signature]] = []
        for number, signature in sorted(group):
            found = (self.compare(number, signature, *other) for other in earlier)
            pair = next(filter(None, found), None)
            if pair is not None:
                yield pair
            earlier.append((number, signature))


class Duplicate(NamedTuple):
    """A document that was taken, and the first one that it duplicates."""

    name: str
    first: str
    reason: str
    similarity: float


class DuplicateIndex:
    """Finds the duplicates among documents that come one after the other.

    Memory grows with the documents that have a text of their own, by
    about 2.8 KB each with the defaults, three quarters of it for the bands.
    """

    def __init__(self, config: Deduplicate):
        self.config = config
        self._rows: dict[bytes, list[int]] = {}  # of each key
        self._names: list[str] = []
        self._values: list[bytes] = []

    def find(self, name: str, signature: Signature) -> Duplicate | None:
        """What the next document, by its name and signature, is a duplicate of."""
        exact, *bands = self.config.keys(signature)
        if exact in self._rows:  # its bands are there too
            return Duplicate(name, self._names[self._rows[exact][0]], EXACT, 1.0)
        near = self._near(name, signature, bands)
        for key in (exact, *bands):
            self._rows.setdefault(key, []).append(len(self._names))
        self._names.append(name)
        self._values.append(signature.values)
        return near

    def _near(self, name: str, signature: Signature, bands: Sequence[bytes]) -> Duplicate | None:
        # In order and lazily: of many that are alike, the first ones settle it.
        rows = heapq.merge(*(self._rows.get(band, ()) for band in bands))
        distinct = (row for row, _ in itertools.groupby(rows))
        while some := list(itertools.islice(distinct, _COMPARED_AT_A_TIME)):
            found = _similarities(signature.values, [self._values[row] for row in some])
            similar = np.flatnonzero(found >= self.config.threshold)
            if len(similar):
                first = similar[0]
                return Duplicate(name, self._names[some[first]], NEAR, float(found[first]))
        return None


def _compared(document: Document) -> str:
    """The text that tells near duplicates."""
    if isinstance(document, TextDocument):
        return text_of(document)
    return text_of_messages(m for m in document.messages if m.role in ("user", "assistant"))


def _similarities(values: bytes, others: Sequence[bytes]) -> np.ndarray:
    """The share of values in which one MinHash and each of the others agree: f64[others]."""
    one = np.frombuffer(values, "<u4")
    several = np.frombuffer(b"".join(others), "<u4").reshape(len(others), len(one))
    return (several == one).mean(axis=1)


@functools.cache
def _empty_minhash(num_permutations: int) -> Any:
    datasketch = library("datasketch", "Deduplicate")
    # CRC-32 tells n-grams apart as well as a cryptographic hash cut to 32 bits, in a tenth of the
    # time, and this scheme mixes its bits before it permutes them.
    return datasketch.MinHash(num_permutations, _SEED, hashfunc=zlib.crc32, scheme="affine32")


@functools.cache
def _bands(threshold: float, num_permutations: int) -> tuple[int, int]:
    """How many bands there are, and how many values wide."""
    datasketch = library("datasketch", "Deduplicate")
    try:
        index = datasketch.MinHashLSH(threshold=threshold, num_perm=num_permutations)
    except ValueError:
        raise ValueError(
            f"Deduplicate.threshold {threshold} leaves a single band of {num_permutations} "
            "permutations: lower the threshold, or give more permutations"
        ) from None
    return index.b, index.r
