"""Files to a token store: read, filtered, freed of duplicates, tokenised, written shard by shard.

Enters: a `BuildConfig`. Leaves: a complete `TokenStore`, and counts that add up: documents read are
kept, skipped (they could not be read or told) or filtered, each with its reason.

    read_inputs   documents, each with its number                    one after the other
    Prepare       filters, signature, tokens: pure, one document      in any number of processes
    duplicates    against all earlier documents                      one after the other
    StoreWriter   a shard at a time; behind the last complete one    one after the other
                  after a kill

The order is that of the inputs, whatever the number of processes, and so is every byte that is
written; beam.py does the same on many machines. What filters left out, or the renderer could not
tell, is in STORE/taken/, a line of JSON a document: its name, the filter, the reason and the
evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from agentx.data.beam import build_on_beam
from agentx.data.curate import DuplicateIndex, evaluation_notes
from agentx.data.parallel import encode_parallel
from agentx.data.prepare import (
    RENDERER,
    BuildConfig,
    Left,
    Prepare,
    Prepared,
    Tally,
    open_writer,
    read_inputs,
    shard_note,
    write_taken,
)
from agentx.data.store import TokenStore


def build(
    config: BuildConfig, on_document: Callable[[int, int], None] = lambda documents, tokens: None
) -> TokenStore:
    """Builds the store of a config, or what is left of it to build; on Beam where it says so.

    on_document: called with the documents seen so far and the tokens of the one that was just
    written; Beam calls nobody. Raises ValueError for what can't be read, and OSError for what can't
    be written.
    """
    if config.beam is not None:
        return build_on_beam(config)
    with open_writer(config) as writer:
        if writer.is_complete:
            return writer.finish()
        written, tally = (-1, -1), Tally()
        if writer.notes:
            source, place = writer.notes[-1]["last"]
            written = source, place
            tally.untold = writer.notes[-1]["untold"]
        documents = read_inputs(config, tally.reads, written)
        prepared = encode_parallel(documents, Prepare(config), config.num_processes)
        taken: list[bytes] = []
        for seen, one in enumerate(_deduplicated(prepared, config, tally), start=1):
            if one.number > written:
                if one.left is not None:
                    taken.append(one.left.line(one.name))
                    tally.untold += one.left.filter == RENDERER
                elif one.trajectory is not None:
                    writer.add(one.trajectory, one.number[0])
                    on_document(seen, len(one.trajectory))
                    if writer.is_full:
                        write_taken(config.out, writer.num_shards, taken)
                        taken = []
                        writer.write_shard(shard_note(one.number, tally.untold))
        write_taken(config.out, writer.num_shards, taken)
        return writer.finish(**tally.notes(config), **evaluation_notes(config.filters))


def _deduplicated(
    prepared: Iterable[Prepared], config: BuildConfig, tally: Tally
) -> Iterator[Prepared]:
    """All of them, counted; those that duplicate an earlier one with that as what is said."""
    index = DuplicateIndex(config.deduplicate) if config.deduplicate else None
    for one in prepared:
        tally.filters += one.counts
        tally.kinds[one.kind] += 1
        if index is not None and one.signature is not None:
            found = index.find(one.name, one.signature)
            if found is not None:
                left = Left("Deduplicate", found.reason, (found.first,))
                tally.filters.drop(left.filter, left.reason, one.counts.read_characters)
                one = one._replace(left=left)
        yield one
