"""The same store, built on Apache Beam: on this machine, or on as many as a runner has.

Enters: a `BuildConfig`. Leaves: the store that `build` leaves, byte for byte. Every function of a
document is that of prepare.py; what is different is how documents meet:

1. Each input is read by one worker, its documents numbered; then they are spread over all.
2. Filters, signatures and tokens, a document at a time.
3. Duplicates: documents that share a key of their signatures are grouped and compared.
4. Where a shard ends follows from the lengths of all documents before, which one worker adds up:
   about 180 bytes a document.
5. Each shard is written by one worker, and the manifest, at the end, by the machine that asked.

Beam hands documents from worker to worker by its own coders; what is on disk is as everywhere.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from agentx.data.curate import FilterCounts, Pair, evaluation_notes
from agentx.data.formats import ReadCounts
from agentx.data.prepare import (
    RENDERER,
    BeamConfig,
    BuildConfig,
    Left,
    Number,
    Numbered,
    Prepare,
    Prepared,
    Tally,
    open_writer,
    read_inputs,
    shard_note,
    write_taken,
)
from agentx.data.shards import Entry, shard_columns, write_shard
from agentx.data.storage import Storage, to_json
from agentx.data.store import TokenStore

# Where workers leave what the manifest is made of.
_FOLDER = "entries"


class _Cut(NamedTuple):
    """The last document of a shard, and how many are untold up to there."""

    last: Number
    untold: int


def build_on_beam(config: BuildConfig) -> TokenStore:
    """Builds the store of a config. All shards are made, also those that an earlier build left.

    Raises ValueError where Beam is not installed, and what `build` raises.
    """
    try:
        import apache_beam as beam
    except ImportError:
        raise ValueError(
            "BuildConfig.beam is set, but Apache Beam is not installed: pip install 'agentx[beam]'"
        ) from None
    where = config.beam or BeamConfig()
    options = beam.options.pipeline_options.PipelineOptions(list(where.options))
    with open_writer(config) as writer:
        if writer.is_complete:
            return writer.finish()
        storage = Storage(config.out)
        storage.delete_below(_FOLDER)  # of a build that failed: its entries may be of other shards
        try:
            with beam.Pipeline(runner=where.runner, options=options) as pipeline:
                _describe(beam, pipeline, config)
        except ValueError as error:  # with Beam's own frames behind it, it would look like a fault
            raise ValueError(str(error)) from None
        tally = json.loads(_read(storage, f"{_FOLDER}/tally.json"))
        keys = sorted(storage.list_keys(_FOLDER) - {f"{_FOLDER}/tally.json"})
        entries = [json.loads(_read(storage, key)) for key in keys]
        for entry in entries[writer.num_shards :]:
            note = entry.pop("note")
            writer.add_shard(entry, note)
        store = writer.finish(**tally, **evaluation_notes(config.filters))
        storage.delete_below(_FOLDER)
        return store


def _describe(beam: Any, pipeline: Any, config: BuildConfig) -> None:
    """What the workers do."""
    read = (
        pipeline
        | beam.Create(range(len(config.inputs)))
        | "spread inputs" >> beam.Reshuffle()
        | "read" >> beam.FlatMap(_read_one, config).with_outputs("counts", main="documents")
    )
    prepared = (
        read.documents
        | "spread documents" >> beam.Reshuffle()
        | "prepare" >> beam.Map(_prepared, Prepare(config))
    )
    if config.deduplicate:
        duplicates = _duplicates(beam, prepared, config)
        prepared = (
            {"one": prepared, "duplicate": duplicates}
            | "join duplicates" >> beam.CoGroupByKey()
            | "say duplicates" >> beam.MapTuple(_said)
        )
    cuts = beam.pvalue.AsSingleton(
        prepared
        | "lengths" >> beam.FlatMap(_length)
        | "all lengths" >> beam.combiners.ToList()
        | "cut" >> beam.Map(_cuts, config)
    )
    (
        prepared
        | "to shards" >> beam.Map(_shard_of, cuts)
        | "shards" >> beam.GroupByKey()
        | "write" >> beam.Map(_write, config, cuts)
    )
    (
        [
            read.counts | "read counts" >> beam.Map(lambda counts: Tally(counts)),
            prepared | "filter counts" >> beam.Map(lambda p: _tally(p[1])),
        ]
        | beam.Flatten()
        | "add up" >> beam.CombineGlobally(_sum)
        | "write tally" >> beam.Map(_write_tally, config)
    )


def _read_one(number: int, config: BuildConfig) -> Iterator[Any]:
    import apache_beam as beam

    counts = ReadCounts()
    try:
        yield from read_inputs(config, counts, only=number)
    except ValueError as error:  # of a kind of ours, which Beam could not hand on
        raise ValueError(str(error)) from None
    yield beam.pvalue.TaggedOutput("counts", counts)


def _prepared(numbered: Numbered, prepare: Prepare) -> tuple[Number, Prepared]:
    try:
        return numbered.number, prepare(numbered)
    except ValueError as error:
        raise ValueError(f"{numbered.name}: {error}") from None


def _duplicates(beam: Any, prepared: Any, config: BuildConfig) -> Any:
    """(number, (pair, name of the first)) of each document that duplicates an earlier one."""
    assert config.deduplicate is not None
    deduplicate = config.deduplicate
    pairs = (
        prepared
        | "sign" >> beam.Filter(lambda p: p[1].signature is not None)
        | "keys" >> beam.FlatMap(lambda p: _keys(deduplicate, p[1]))
        | "same key" >> beam.GroupByKey()
        | "pairs" >> beam.FlatMapTuple(lambda key, group: deduplicate.pairs_in(group))
        | "by later" >> beam.Map(lambda pair: (pair.number, pair))
        | "pairs of one" >> beam.GroupByKey()
        | "first pair" >> beam.MapTuple(lambda number, found: min(found))
    )
    names = prepared | "names" >> beam.MapTuple(lambda number, one: (number, one.name))
    by_first = pairs | "by first" >> beam.Map(lambda pair: (pair.first, pair))
    return (
        {"pairs": by_first, "names": names}
        | "join names" >> beam.CoGroupByKey()
        | "name" >> beam.FlatMapTuple(_named)
    )


def _keys(deduplicate: Any, one: Prepared) -> Iterator[tuple[bytes, Any]]:
    for key in deduplicate.keys(one.signature):
        yield key, (one.number, one.signature)


def _named(first: Number, joined: dict[str, Iterable[Any]]) -> Iterator[tuple[Any, Any]]:
    pairs = list(joined["pairs"])
    if pairs:
        (name,) = joined["names"]
        for pair in pairs:
            yield pair.number, (pair, name)


def _said(number: Number, joined: dict[str, Iterable[Any]]) -> tuple[Number, Prepared]:
    """A document with what makes it a duplicate, if anything, as what is said of it."""
    (one,) = joined["one"]
    for pair, name in joined["duplicate"]:
        assert isinstance(pair, Pair)
        one = one._replace(left=Left("Deduplicate", pair.reason, (name,)))
    return number, one


def _length(numbered: tuple[Number, Prepared]) -> Iterator[tuple[Number, int]]:
    """The tokens of a document that is kept, -1 for one that can't be told."""
    number, one = numbered
    if one.left is None:
        assert one.trajectory is not None
        yield number, len(one.trajectory)
    elif one.left.filter == RENDERER:
        yield number, -1


def _cuts(lengths: Iterable[tuple[Number, int]], config: BuildConfig) -> list[_Cut]:
    """Where shards end, all but the last: with the document that fills them."""
    cuts, tokens, untold = [], 0, 0
    for number, length in sorted(lengths):
        if length < 0:
            untold += 1
        else:
            tokens += length
            if tokens >= config.shard_tokens:
                cuts.append(_Cut(number, untold))
                tokens = 0
    return cuts


def _shard_of(numbered: tuple[Number, Prepared], cuts: list[_Cut]) -> tuple[int, Prepared]:
    number, one = numbered
    return bisect.bisect_left([cut.last for cut in cuts], number), one


def _write(numbered: tuple[int, Iterable[Prepared]], config: BuildConfig, cuts: list[_Cut]) -> None:
    """Writes a shard, its entry for the manifest, and what was left out beside it."""
    shard, group = numbered
    ordered = sorted(group, key=lambda one: one.number)
    lines = (one.left.line(one.name) for one in ordered if one.left is not None)
    write_taken(config.out, shard, lines)
    documents = [
        Entry(one.trajectory, one.number[0])
        for one in ordered
        if one.left is None and one.trajectory is not None
    ]
    if documents:
        storage = Storage(config.out)
        entry = write_shard(storage, shard, shard_columns(documents))
        note = shard_note(*cuts[shard]) if shard < len(cuts) else None
        storage.write(f"{_FOLDER}/{shard:05d}.json", to_json({**entry, "note": note}))


def _tally(one: Prepared) -> Tally:
    untold = one.left is not None and one.left.filter == RENDERER
    return Tally(filters=_counts(one), kinds=collections.Counter({one.kind: 1}), untold=int(untold))


def _counts(one: Prepared) -> FilterCounts:
    """What became of a document in the filters, the comparison with others included."""
    if one.left is None or one.left.filter != "Deduplicate":
        return one.counts
    counts = one.counts + FilterCounts()
    counts.drop(one.left.filter, one.left.reason, counts.read_characters)
    return counts


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        for field in dataclasses.fields(ReadCounts):
            both = getattr(total.reads, field.name) + getattr(tally.reads, field.name)
            setattr(total.reads, field.name, both)
        total.filters += tally.filters
        total.kinds += tally.kinds
        total.untold += tally.untold
    return total


def _write_tally(tally: Tally, config: BuildConfig) -> None:
    Storage(config.out).write(f"{_FOLDER}/tally.json", to_json(tally.notes(config)))


def _read(storage: Storage, key: str) -> bytes:
    data, _ = storage.read(key)
    if data is None:
        raise OSError(f"{storage.name(key)} is missing: a worker of Beam did not write it")
    return data
