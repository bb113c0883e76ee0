"""manifest.json of a token store: what is there, what it was made from, and what has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from agentx.data.storage import Storage

FORMAT = 3
MANIFEST = "manifest.json"


def make_manifest(
    about: dict[str, Any],
    shards: Sequence[dict[str, Any]],
    *,
    is_complete: bool,
    notes: dict[str, Any],
) -> dict[str, Any]:
    """What manifest.json holds. The fingerprint covers what is in the store, not its name."""
    files = [[shard["name"], shard["files"]] for shard in shards]
    identity = [FORMAT, about["tokenizer_fingerprint"], about["markers"], about["sources"], files]
    return {
        **about,
        "complete": is_complete,
        **{f"num_{k}": sum(s[k] for s in shards) for k in ("trajectories", "spans", "tokens")},
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "notes": notes,
        "shards": list(shards),
    }


def read_manifest(storage: Storage) -> tuple[dict[str, Any] | None, bytes]:
    """The manifest, None where there is none, and its generation."""
    data, generation = storage.read(MANIFEST)
    if data is None:
        return None, generation
    try:
        found: dict[str, Any] = json.loads(data)
        version = found.get("format")
    except (ValueError, AttributeError):
        raise ValueError(f"{storage.name(MANIFEST)} is damaged: build the store again") from None
    if version != FORMAT:
        raise ValueError(
            f"{storage} is a store of format {version}, this is the code for format {FORMAT}: "
            "build it again"
        )
    return found, generation


def files_of(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for shard in manifest["shards"]:
        for key, expected in shard["files"].items():
            yield f"{shard['name']}/{key}", expected


def refuse_changes(
    storage: Storage,
    found: dict[str, Any],
    about: dict[str, Any],
    old_inputs: dict[str, Any],
    inputs: dict[str, Any],
) -> None:
    """Raises ValueError where a store was begun otherwise, and says what changed."""
    ending = "delete it to start over, or write elsewhere"
    for name in sorted({*old_inputs, *inputs}):
        if old_inputs.get(name) != inputs.get(name):
            how = "new" if name not in old_inputs else "gone" if name not in inputs else "changed"
            raise ValueError(f"{storage} was begun from other inputs: {name} is {how}; {ending}")
    for name, value in about.items():
        before = found[name]
        if before != value:
            if isinstance(value, dict):
                name = next(k for k in {**value, **before} if value.get(k) != before.get(k))
                before, value = before.get(name), value.get(name)
            raise ValueError(
                f"{storage} was begun with another {name.replace('_', ' ')}: {before}, not "
                f"{value}; {ending}"
            )
