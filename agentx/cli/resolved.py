"""A built config as the text of a run file: flat, complete, and enough to repeat the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from agentx.cli.registry import name_of


def format_config(value: Any) -> str:
    """A run file with every parameter of `value`, defaults included; no includes, no macros.

    value: an instance of a dataclass in `registry.REGISTRY`. `config.load_config` of the text gives
    an equal object. Instances of one class that differ get scopes, named after the fields that hold
    them.
    """
    return _Writer(value).text


class _Writer:
    """Writes a tree of dataclasses as bindings, parents before the children they refer to."""

    def __init__(self, root: Any) -> None:
        self._distinct: dict[str, list[Any]] = {}
        self._scopes: dict[str, list[str]] = {}
        self._collect(root, ())
        lines = [
            "# The resolved configuration: every parameter, defaults included.",
            "# This file alone repeats the run.",
        ]
        for name, instances in self._distinct.items():
            for instance in instances:
                lines.append("")
                for field in dataclasses.fields(instance):
                    if field.init:
                        value = self._format(getattr(instance, field.name))
                        lines.append(f"{self._scoped(instance)}.{field.name} = {value}")
                if not dataclasses.fields(instance):
                    lines.append(f"# {name} has no parameters.")
        self.text = "\n".join(lines) + "\n"

    def _collect(self, value: Any, path: tuple[str, ...]) -> None:
        """Notes every instance that differs from the others of its class, with a name for it."""
        match value:
            case list() | tuple():
                for index, inner in enumerate(value):
                    self._collect(inner, (*path, str(index)))
            case dict():
                for key, inner in value.items():
                    self._collect(inner, (*path, str(key)))
            case _ if dataclasses.is_dataclass(value):
                name = name_of(type(value))
                instances = self._distinct.setdefault(name, [])
                if value not in instances:
                    instances.append(value)
                    self._scopes.setdefault(name, []).append("_".join(path))
                for field in dataclasses.fields(value):
                    if field.init:
                        self._collect(getattr(value, field.name), (*path, field.name))

    def _scoped(self, instance: Any) -> str:
        name = name_of(type(instance))
        instances = self._distinct[name]
        if len(instances) == 1:
            return name
        return f"{self._scopes[name][instances.index(instance)]}/{name}"

    def _format(self, value: Any) -> str:
        match value:
            case list():
                return "[" + ", ".join(self._format(inner) for inner in value) + "]"
            case tuple():
                ending = ",)" if len(value) == 1 else ")"
                return "(" + ", ".join(self._format(inner) for inner in value) + ending
            case dict():
                items = (f"{self._format(k)}: {self._format(v)}" for k, v in value.items())
                return "{" + ", ".join(items) + "}"
            case Path():
                return repr(str(value))
            case _ if dataclasses.is_dataclass(value):
                return f"@{self._scoped(value)}()"
            case _:
                assert value is None or isinstance(value, bool | int | float | str), value
                return repr(value)
