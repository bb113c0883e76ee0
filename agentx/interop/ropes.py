"""RoPE's bases and scalings in config.json, read both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agentx.model.config import ModelConfig
from agentx.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope

# What config.json calls each kind of RoPE's scaling; and its numbers, ours and theirs. A number
# that config.json leaves out has our default. Dynamic scaling has its original length in
# max_position_embeddings.
_ROPES: dict[str, tuple[type[RopeScaling], dict[str, str]]] = {
    "linear": (LinearRope, {"factor": "factor"}),
    "dynamic": (DynamicRope, {"factor": "factor"}),
    "yarn": (
        YarnRope,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "truncate",
        },
    ),
    "llama3": (
        Llama3Rope,
        {
            "factor": "factor",
            "original_length": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
    "longrope": (
        LongRope,
        {
            "short_factor": "short_factor",
            "long_factor": "long_factor",
            "original_length": "original_max_position_embeddings",
            "factor": "factor",
            "attention_factor": "attention_factor",
        },
    ),
}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """rope_theta and, where it is scaled, rope_scaling; and both as transformers 5 has them."""
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return {**theta, "rope_parameters": {"rope_type": "default", **theta}}
    ((kind, names),) = [
        (kind, names) for kind, (cls, names) in _ROPES.items() if cls is type(scaling)
    ]
    numbers = {theirs: getattr(scaling, ours) for ours, theirs in names.items()}
    given = {name: number for name, number in numbers.items() if number is not None}
    scaled = {"rope_type": kind, **given}
    about = {**theta, "rope_scaling": scaled, "rope_parameters": {**scaled, **theta}}
    if isinstance(scaling, DynamicRope):
        about["max_position_embeddings"] = scaling.original_length
    return about


def read_rope(about: Mapping[str, Any], theta: float) -> tuple[float, RopeScaling | None]:
    """The base, `theta` where config.json gives none, and the scaling.

    Raises ValueError for a kind or a number that we do not know.
    """
    given = dict(about.get("rope_scaling") or about.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.pop("type", "default")
    given = {name: value for name, value in given.items() if value is not None}
    given.pop("type", None)
    theta = given.pop("rope_theta", None) or about.get("rope_theta") or theta
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("heads of which a part is rotated cannot be read")
    if kind == "default":
        return theta, None
    if kind not in _ROPES:
        raise ValueError(f"rope_type is {kind!r}; only {', '.join(_ROPES)} and default can be read")
    cls, names = _ROPES[kind]
    length = about["max_position_embeddings"]
    if "original_length" in names:
        original = about.get("original_max_position_embeddings", length)
        given.setdefault("original_max_position_embeddings", original)
    surplus = sorted(given.keys() - set(names.values()))
    if surplus:
        raise ValueError(f"{surplus[0]} is no number of rope_type {kind!r}")
    numbers = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    numbers = {name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()}
    if cls is DynamicRope:
        numbers["original_length"] = length
    required = (x.name for x in dataclasses.fields(cls) if x.default is dataclasses.MISSING)
    for name in required:
        if name not in numbers:
            raise ValueError(f"rope_type {kind!r} lacks {names[name]}")
    return theta, cls(**numbers)
