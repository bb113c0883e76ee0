"""What a build is made from, and what can be done of it a document at a time.

Enters: a `BuildConfig`. Leaves: numbered documents, each `Prepared` by itself, and the writer of
the store that they go into. build.py does the rest on one machine, beam.py on many.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from agentx.data.curate import (
    Deduplicate,
    Filter,
    FilterCounts,
    Signature,
    Taken,
    run_filters,
)
from agentx.data.formats import (
    Document,
    OnError,
    ReadCounts,
    TextDocument,
    conversation_trajectory,
    identify,
    read_documents,
    text_trajectory,
)
from agentx.data.storage import Storage
from agentx.data.store import SHARD_TOKENS, StoreWriter
from agentx.render import ChatRenderer, Renderer, ToolRenderer
from agentx.tokenizer import Tokenizer
from agentx.trajectory import Markers, Trajectory

Format = Literal["tool", "chatml", "llama3", "qwen3", "hermes"]
# What `Left.filter` says where no filter left a document out.
RENDERER = "renderer"
# Of an input among the inputs, and of a document in it.
Number = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Input:
    """Documents of one source: a file, a folder or a glob, here or in a bucket.

    name: of the source, for `agentx data stats`; the path where it is "". format, field, trace,
    pattern: see `agentx.data.formats.read_documents`.
    """

    path: str
    name: str = ""
    format: str = ""
    field: str = ""
    trace: str = ""
    pattern: str = "*"


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Where Apache Beam runs: its runner, DataflowRunner for instance, and its pipeline options."""

    runner: str = "DirectRunner"
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """What goes into a store, and how.

    filters: in this order. deduplicate: None leaves duplicates in. renderer: the format that
    conversations are written in. on_error: whether a record that can't be read ends the build, or
    is skipped and counted. num_processes: that filter and tokenise. shard_tokens: about as many are
    in a shard; one is in memory. beam: builds it on Apache Beam, on one machine or many.
    """

    inputs: tuple[Input, ...]
    tokenizer: str
    out: str
    filters: tuple[Filter, ...] = ()
    deduplicate: Deduplicate | None = None
    renderer: Format = "tool"
    on_error: OnError = "raise"
    num_processes: int = 1
    shard_tokens: int = SHARD_TOKENS
    beam: BeamConfig | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("BuildConfig.inputs is empty: there is nothing to build a store from")
        for name in ("num_processes", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"BuildConfig.{name} is {getattr(self, name)}; it is 1 or more")

    @property
    def untold(self) -> str:
        """The reason under which conversations are counted that their renderer cannot tell."""
        return f"not in the {self.renderer} format"

    @property
    def sources(self) -> list[str]:
        """The name of each input."""
        return [given.name or given.path for given in self.inputs]


class Numbered(NamedTuple):
    """A document that was read. is_written: whether a complete shard holds it already."""

    number: Number
    document: Document
    is_written: bool

    @property
    def name(self) -> str:
        return self.document.name

    @property
    def num_characters(self) -> int:
        return self.document.num_characters


class Left(NamedTuple):
    """Why a document is left out: which filter says so, under which reason, on what evidence.

    filter: `RENDERER` where it is the renderer, which can't tell the document.
    """

    filter: str
    reason: str
    evidence: tuple[str, ...] = ()

    def line(self, name: str) -> bytes:
        """What is written of it below taken/."""
        return (json.dumps({"name": name, **self._asdict()}, ensure_ascii=False) + "\n").encode()


class Prepared(NamedTuple):
    """What can be said of a document by itself.

    kind: "text" or "conversation". counts: of its filters. left: what the last of them, or the
    renderer, said. trajectory: None where it is left out, or written.
    """

    number: Number
    name: str
    kind: str
    counts: FilterCounts
    left: Left | None
    signature: Signature | None
    trajectory: Trajectory | None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Filters, signature and tokens of a document: pure, so that any process may do it."""

    config: BuildConfig

    def __call__(self, numbered: Numbered) -> Prepared:
        """Raises ValueError for a document that can't be told, where such are not skipped."""
        config, (number, document, is_written) = self.config, numbered
        counts = FilterCounts()
        kind = "text" if isinstance(document, TextDocument) else "conversation"
        result = run_filters(config.filters, document, counts)
        if isinstance(result, Taken):
            left = Left(counts.rows[0].filter, *result)
            return Prepared(number, document.name, kind, counts, left, None, None)
        signature = config.deduplicate.signature(result) if config.deduplicate else None
        if is_written:
            return Prepared(number, document.name, kind, counts, None, signature, None)
        renderer = load_renderer(config.tokenizer, config.renderer)
        try:
            trajectory = trajectory_of(result, renderer)
        except ValueError as error:
            if config.on_error == "raise":
                raise
            left = Left(RENDERER, config.untold, (str(error),))
            return Prepared(number, document.name, kind, counts, left, signature, None)
        return Prepared(number, document.name, kind, counts, None, signature, trajectory)


def trajectory_of(document: Document, renderer: Renderer) -> Trajectory:
    """The tokens of a document. Raises ValueError for what the renderer can't tell."""
    if isinstance(document, TextDocument):
        return text_trajectory(document, renderer.tokenizer)
    return conversation_trajectory(document, renderer)


@functools.lru_cache(maxsize=1)
def load_renderer(tokenizer: str, format: Format) -> Renderer:
    """The renderer of a format with the tokenizer of a file; loaded once a process."""
    loaded = Tokenizer.load(tokenizer)
    return ToolRenderer(loaded) if format == "tool" else ChatRenderer(loaded, format)


def read_inputs(
    config: BuildConfig, counts: ReadCounts, written: Number = (-1, -1), only: int | None = None
) -> Iterator[Numbered]:
    """The documents of all inputs, or of `only` one, in order.

    written: the number of the last one in a complete shard.
    """
    for number, given in enumerate(config.inputs):
        if only not in (None, number):
            continue
        documents = read_documents(
            given.path,
            format=given.format,
            field=given.field,
            trace=given.trace,
            pattern=given.pattern,
            on_error=config.on_error,
            counts=counts,
        )
        for place, document in enumerate(documents):
            yield Numbered((number, place), document, (number, place) <= written)


def open_writer(config: BuildConfig) -> StoreWriter:
    """Begins the store of a config, or goes on with it where nothing has changed.

    Raises ValueError also where the renderer can't be loaded: here it is said once.
    """
    load_renderer.cache_clear()  # the file may be another one by now
    tokenizer = load_renderer(config.tokenizer, config.renderer).tokenizer
    filters, deduplicate = config.filters, config.deduplicate
    reads = [dataclasses.astuple(given) for given in config.inputs]
    return StoreWriter(
        config.out,
        tokenizer.fingerprint,
        made_from={
            "version of agentx": importlib.metadata.version("agentx"),
            "way of reading": repr((reads, config.on_error)),
            "list of filters": repr(filters),
            "way of deduplication": repr(deduplicate),
            "renderer": config.renderer,
            "size of shards": str(config.shard_tokens),
        },
        inputs=_identified(config),
        sources=config.sources,
        markers=Markers.of(tokenizer.special),
        shard_tokens=config.shard_tokens,
    )


def _identified(config: BuildConfig) -> dict[str, list[Any]]:
    """Size and checksum of every file that the store is made from, by path."""
    asked = [(given.path, given.pattern) for given in config.inputs]
    for filter in config.filters:
        asked += ((path, "*") for path in getattr(filter, "files", ()))
    return {path: [size, checksum] for given in asked for path, size, checksum in identify(*given)}


@dataclasses.dataclass
class Tally:
    """What became of all documents. untold: those that the renderer could not tell."""

    reads: ReadCounts = dataclasses.field(default_factory=ReadCounts)
    filters: FilterCounts = dataclasses.field(default_factory=FilterCounts)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    untold: int = 0

    def notes(self, config: BuildConfig) -> dict[str, Any]:
        """How the manifest says it."""
        filtered = {f"{row.filter}: {row.reason}": row.documents for row in self.filters.rows}
        untold = collections.Counter({config.untold: self.untold} if self.untold else {})
        return {
            "read": self.reads.read,
            "kinds": dict(sorted(self.kinds.items())),
            "kept": self.reads.kept - sum(filtered.values()) - self.untold,
            "skipped": dict(sorted((self.reads.skipped + untold).items())),
            "filtered": filtered,
            "changed": dict(sorted(self.filters.changed.items())),
        }


def describe(notes: dict[str, Any]) -> str:
    """`9 records read (8 texts) = 6 kept (2 changed by F) + 1 skipped (1 empty) + 2 filtered ..`"""

    def listed(counts: dict[str, int], form: str = "{n:,} {name}") -> str:
        parts = ", ".join(form.format(n=n, name=name) for name, n in counts.items())
        return f" ({parts})" if parts else ""

    parts = [
        f"{notes['kept']:,} kept" + listed(notes["changed"], "{n:,} changed by {name}"),
        f"{sum(notes['skipped'].values()):,} skipped" + listed(notes["skipped"]),
        f"{sum(notes['filtered'].values()):,} filtered" + listed(notes["filtered"]),
    ]
    kinds = {f"{kind}s" if n != 1 else kind: n for kind, n in notes["kinds"].items()}
    items = listed(notes.get("evaluation", {}), "{n:,} evaluation items {name}")
    return f"{notes['read']:,} records read{listed(kinds)} = {' + '.join(parts)}{items}"


def shard_note(last: Number, untold: int) -> dict[str, Any]:
    """What a build needs to go on behind a shard: its last document, and how many are untold."""
    return {"last": list(last), "untold": untold}


def write_taken(store: str, shard: int, lines: Iterable[bytes]) -> None:
    """What was left out while a shard came together."""
    data = b"".join(lines)
    if data:
        Storage(store).write(f"taken/{shard:05d}.jsonl", data)
