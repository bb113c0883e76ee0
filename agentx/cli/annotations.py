"""Does a value that somebody wrote fit an annotation? With the words to say so where it doesn't."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def coerce(value: Any, wanted: Any) -> Any:
    """`value` as an annotation wants it. Raises TypeError where it doesn't fit.

    An int may stand for a float, a list for a tuple, a string for a Path; a bool is no int.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if wanted is None or wanted is types.NoneType:
        return _fit(value, value is None)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            # The exact type first: 1 stays an int where both int and float are welcome.
            if isinstance(option, type) and type(value) is option:
                return value
        for option in arguments:
            try:
                return coerce(value, option)
            except TypeError:
                continue
        raise TypeError(value)
    if origin is typing.Literal:
        return _fit(value, any(type(value) is type(a) and value == a for a in arguments))
    if origin is tuple:
        _fit(value, isinstance(value, list | tuple))
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(coerce(inner, arguments[0]) for inner in value)
        _fit(value, len(value) == len(arguments))
        return tuple(coerce(inner, a) for inner, a in zip(value, arguments, strict=True))
    if origin in (list, collections.abc.Sequence):
        _fit(value, isinstance(value, list | tuple))
        items = [coerce(inner, arguments[0]) for inner in value]
        return items if origin is list else tuple(items)
    if origin in (dict, collections.abc.Mapping):
        _fit(value, isinstance(value, dict))
        key, item = arguments
        return {coerce(k, key): coerce(v, item) for k, v in value.items()}
    if wanted is collections.abc.Callable or origin is collections.abc.Callable:
        return _fit(value, callable(value))
    if origin is not None:
        return coerce(value, origin)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is int and isinstance(value, bool):
        raise TypeError(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if getattr(wanted, "_is_protocol", False):
        return _fit(value, all(hasattr(value, member) for member in _members(wanted)))
    return _fit(value, isinstance(value, wanted))


def _members(protocol: type) -> list[str]:
    """What a protocol asks for, as far as `hasattr` can tell."""
    names = [*vars(protocol), *protocol.__annotations__]
    return [name for name in names if name == "__call__" or not name.startswith("_")]


def _fit(value: Any, fits: bool) -> Any:
    if not fits:
        raise TypeError(value)
    return value


def describe(wanted: Any) -> str:
    """An annotation in words: "int", "one of 'a', 'b'", "tuple[int, ...]", "an OptimizerConfig"."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        return f"one of {', '.join(repr(a) for a in arguments)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if wanted is types.NoneType:
        return "None"
    if origin is not None or not isinstance(wanted, type):
        return str(wanted).replace("typing.", "").replace("collections.abc.", "")
    if wanted.__module__ == "builtins":
        return wanted.__name__
    return f"{_article(wanted.__name__)} {wanted.__name__}"


def describe_value(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f"{_article(type(value).__name__)} {type(value).__name__}"
    return f"{value!r} ({type(value).__name__})" if value is not None else "None"


def _article(name: str) -> str:
    return "an" if name[0] in "AEIOU" else "a"
