"""A `ModelConfig` as JSON, and back: what a checkpoint says of its model.

A setting that is a small dataclass of its own, such as `YarnRope` or `MoEConfig`, is an object with
the name of its class; a tuple is a list. Settings that a file leaves out have our defaults, so that
checkpoints of before a setting are read as what they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agentx.model.config import LatentConfig, ModelConfig
from agentx.model.moe_config import MoEConfig
from agentx.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope

_NESTED: dict[str, type] = {
    cls.__name__: cls
    for cls in (LatentConfig, MoEConfig, LinearRope, DynamicRope, YarnRope, Llama3Rope, LongRope)
}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """What JSON can hold of a config: all of it."""
    return {name: _write(value) for name, value in _fields(config).items()}


def config_from_json(about: Mapping[str, Any]) -> ModelConfig:
    """The config that `config_to_json` wrote. Raises ValueError for anything else."""
    try:
        return ModelConfig(**{name: _read(value) for name, value in about.items()})
    except TypeError as error:
        raise ValueError(f"this is no model that this version knows: {error}") from error


def _fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _write(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        name = type(value).__name__
        assert _NESTED.get(name) is type(value), f"{name} is no part of a saved config"
        return {"class": name, **{k: _write(v) for k, v in _fields(value).items()}}
    return [_write(x) for x in value] if isinstance(value, tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        settings = {k: _read(v) for k, v in value.items() if k != "class"}
        if value.get("class") not in _NESTED:
            raise ValueError(f"{value.get('class')!r} is no setting of a model")
        return _NESTED[value["class"]](**settings)
    return tuple(_read(x) for x in value) if isinstance(value, list) else value
