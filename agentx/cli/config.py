"""Run files: gin text in, frozen dataclasses out, and back again. The only module that imports gin.

A .gin file binds the fields of the dataclasses in `REGISTRY`, and refers from one to another:

    include "models/tiny.gin"
    OUT = "runs/tiny"
    TrainConfig.model = @ModelConfig()
    TrainConfig.optimizer = @slow/OptimizerConfig()
    TrainConfig.tokenizer = %OUT/tokenizer.model
    slow/OptimizerConfig.learning_rate = 1e-4

%OUT is the value of the macro OUT, and %OUT/tokenizer.model a path below it: that much is added to
gin's grammar, which has no other use for it.

`load_config` reads such a file in four steps: statements (gin's own parser) -> bindings, each with
the place where it stands -> objects, built from the root and checked against the annotations ->
a check that nothing was bound in vain. `save_config` writes an object as one flat file with every
parameter in it, from which `load_config` makes an equal object.

Only gin's parser is used, not its registry of decorated functions: that one is global to the
process, forgets where a value came from and ignores bindings that nothing reads. Includes are
looked for beside the including file, then in the configs folder. Python imports in a .gin file are
left out: what a file may name is the table in registry.py.
"""

from __future__ import annotations

import dataclasses
import re
import tokenize
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

import agentx
from agentx.cli.annotations import coerce, describe, describe_value
from agentx.cli.registry import REGISTRY, ConfigError, find_class, name_of, nearest
from agentx.cli.resolved import format_config

GIN_PREFIX = "--gin."


# --------------------------------------------------------------------------------------------------
# The public face
# --------------------------------------------------------------------------------------------------


def load_config(
    path: str | Path, overrides: Sequence[str] = (), root: str | Sequence[str] = "TrainConfig"
) -> Any:
    """The object that a run file describes.

    path: a file, or a name below the configs folder ("runs/quickstart/pretrain.gin").
    overrides: "Name.field=value" each, with or without the prefix "--gin."; the last one wins. A
      value that is no gin literal is taken as a string, so that paths need no quotes.
    root: the name in `REGISTRY` of the object to build; of several, the first that is bound at all.
    Raises ConfigError for everything that can be wrong with either.
    """
    file = find_config(path)
    bindings = _Bindings()
    _read_file(file, bindings, including=())
    for override in overrides:
        _read_override(override, bindings)
    roots = [root] if isinstance(root, str) else list(root)
    bound = {name for _, name, _ in bindings.fields}
    name = next((name for name in roots if name in bound), roots[0])
    value = _Builder(bindings).build(_Reference("", name), _Place(str(path)), scope=(), parents=())
    bindings.refuse_unused(name)
    return value


def save_config(value: Any, path: Path) -> None:
    """Writes `format_config(value)` to a file, after making sure that it reads back the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_config(value), encoding="utf-8")
    assert load_config(path, root=name_of(type(value))) == value, f"{path} does not read back"


def configs_folder() -> Path:
    """Where the .gin files that come with agentx are: in the wheel, or beside it in a checkout."""
    package = Path(agentx.__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def find_config(path: str | Path) -> Path:
    """The file that a path or a name below the configs folder means; the suffix may be left out."""
    folder = configs_folder()
    for candidate in (Path(path), Path(f"{path}.gin"), folder / path, folder / f"{path}.gin"):
        if candidate.is_file():
            return candidate
    known = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.gin"))
    raise ConfigError(f"{path}: there is no such run file{nearest(str(path), known)}")


# --------------------------------------------------------------------------------------------------
# Text -> bindings
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where something was written: a line of a file, or an override on the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class _Reference:
    """`@scope/Name()` in a value."""

    scope: str
    name: str
    called: bool = True

    def __str__(self) -> str:
        return f"@{self.scope}/{self.name}" if self.scope else f"@{self.name}"


@dataclasses.dataclass(frozen=True)
class _Macro:
    """`%NAME` in a value, or `%NAME/rest`: a path below the folder that NAME says."""

    name: str
    rest: str = ""


@dataclasses.dataclass
class _Binding:
    value: Any
    place: _Place
    used: bool = False


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as they are written: the builder gives them their meaning."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return _Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> _Macro:
        name, _, rest = macro_name.partition("/")
        return _Macro(name, rest)


class _Bindings:
    """Every value that was written, by (scope, name, field), and every macro, by name."""

    def __init__(self) -> None:
        self.fields: dict[tuple[str, str, str], _Binding] = {}
        self.macros: dict[str, _Binding] = {}

    def bind(self, scope: str, name: str, field: str, value: Any, place: _Place) -> None:
        """Binds a field, or a macro where `field` is empty; a later binding replaces an earlier."""
        if not field:
            if scope:
                raise ConfigError(f"{place}: {scope}/{name}: a macro can't have a scope")
            self.macros[name] = _Binding(value, place)
            return
        cls = find_class(name, place)
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        if field not in known:
            raise ConfigError(f"{place}: {name} has no parameter {field!r}{nearest(field, known)}")
        self.fields[scope, name, field] = _Binding(value, place)

    def of(self, name: str, scope: tuple[str, ...]) -> dict[str, _Binding]:
        """The fields bound for `name` within a scope: an inner scope wins over an outer one."""
        found = {}
        for depth in range(len(scope) + 1):
            prefix = "/".join(scope[:depth])
            for (where, owner, field), binding in self.fields.items():
                if (where, owner) == (prefix, name):
                    binding.used = True
                    found[field] = binding
        return found

    def refuse_unused(self, root: str) -> None:
        for (scope, name, field), binding in self.fields.items():
            if not binding.used:
                owner = f"{scope}/{name}" if scope else name
                raise ConfigError(
                    f"{binding.place}: {owner}.{field} is set, but nothing in {root} "
                    f"refers to @{owner}(); refer to it or take the line out"
                )


def _read_file(file: Path, bindings: _Bindings, including: tuple[Path, ...]) -> None:
    """Binds what a file says. `including`: the files whose include led here, outermost first."""
    if file.resolve() in including:
        raise ConfigError(f"{file}: the file includes itself, by way of {including[-1]}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    for statement in _statements(text, str(file)):
        place = _Place(str(file), statement.location.line_num)
        match statement:
            case config_parser.BindingStatement():
                bindings.bind(
                    statement.scope, statement.selector, statement.arg_name, statement.value, place
                )
            case config_parser.BlockDeclaration():
                find_class(statement.selector, place)
            case config_parser.IncludeStatement():
                included = _find_include(statement.filename, file, place)
                _read_file(included, bindings, (*including, file.resolve()))
            case _:
                raise ConfigError(
                    f"{place}: a run file can't import Python; it can name {', '.join(REGISTRY)}"
                )


def _statements(text: str, file: str) -> Iterator[Any]:
    """gin's statements, with its errors of syntax turned into sentences."""
    try:
        yield from config_parser.ConfigParser(_NamedText(text, file), _Delegate())
    except ConfigError:
        raise
    except SyntaxError as error:
        line = (error.text or "").strip()
        shown = f" in {line!r}" if line else ""
        message = " ".join(str(error.msg).split()).rstrip(".")
        raise ConfigError(f"{_Place(file, error.lineno)}: {message}{shown}") from None
    except tokenize.TokenError as error:
        message, (line_number, _) = error.args
        raise ConfigError(f"{_Place(file, line_number)}: {message}") from None


class _NamedText:
    """What gin's parser wants of a file: lines and a name."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._lines = iter(text.splitlines(keepends=True))

    def readline(self) -> str:
        return next(self._lines, "")


def _find_include(name: str, file: Path, place: _Place) -> Path:
    for candidate in (file.parent / name, configs_folder() / name):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{place}: there is no file {name!r} beside {file.name} or in {configs_folder()}"
    )


def _read_override(override: str, bindings: _Bindings) -> None:
    """Binds "Name.field=value" or "MACRO=value"."""
    text = override.removeprefix(GIN_PREFIX)
    place = _Place(GIN_PREFIX + text)
    key, equals, literal = text.partition("=")
    if not equals:
        raise ConfigError(f"{place}: write an override as {GIN_PREFIX}Name.field=value")
    scope, name, field = config_parser.parse_binding_key(key)
    if not all(config_parser.IDENTIFIER_RE.match(part) for part in re.split("[./]", key)):
        raise ConfigError(f"{place}: {key!r} is not of the form Name.field")
    if not field and name not in bindings.macros:
        raise ConfigError(
            f"{place}: no file defines a macro {name!r}{nearest(name, bindings.macros)}"
        )
    try:
        values = [statement.value for statement in _statements(f"{key} = {literal}\n", str(place))]
    except ConfigError:
        values = []
    bindings.bind(scope, name, field, values[0] if len(values) == 1 else literal, place)


# --------------------------------------------------------------------------------------------------
# Bindings -> objects
# --------------------------------------------------------------------------------------------------


class _Builder:
    """Builds the objects that the bindings describe, from a reference downwards."""

    def __init__(self, bindings: _Bindings) -> None:
        self.bindings = bindings

    def build(
        self,
        reference: _Reference,
        place: _Place,
        scope: tuple[str, ...],
        parents: tuple[tuple[tuple[str, ...], str], ...],
    ) -> Any:
        """The instance that a reference at `place`, met within `scope`, stands for.

        `parents`: (scope, name) of the instances that are being built, outermost first.
        """
        cls = find_class(reference.name, place)
        if not reference.called:
            raise ConfigError(
                f"{place}: write {reference}() with brackets, for the object it makes"
            )
        if reference.scope:
            scope = tuple(reference.scope.split("/"))
        if (scope, reference.name) in parents:
            raise ConfigError(f"{place}: {reference}() refers to itself")
        parents = (*parents, (scope, reference.name))

        bound = self.bindings.of(reference.name, scope)
        wanted = typing.get_type_hints(cls)
        arguments = {}
        for field, binding in bound.items():
            label = f"{reference.name}.{field}"
            value = self._resolve(binding.value, label, binding.place, scope, parents, ())
            try:
                arguments[field] = coerce(value, wanted[field])
            except TypeError:
                raise ConfigError(
                    f"{binding.place}: {label} wants {describe(wanted[field])}, "
                    f"not {describe_value(value)}"
                ) from None
        for name in _required_fields(cls):
            if name not in arguments:
                label = f"{reference.name}.{name}"
                raise ConfigError(
                    f"{place}: {label} is not set; bind it to {describe(wanted[name])}"
                )
        try:
            return cls(**arguments)
        except ValueError as error:
            first = next((binding.place for binding in bound.values()), place)
            raise ConfigError(f"{first}: {reference.name}: {error}") from error

    def _resolve(
        self,
        value: Any,
        label: str,
        place: _Place,
        scope: tuple[str, ...],
        parents: tuple[tuple[tuple[str, ...], str], ...],
        macros: tuple[str, ...],
    ) -> Any:
        """`value` with every reference built and every macro replaced, at any depth.

        `label`: the field it is for. `macros`: the names of the macros that led here.
        """

        def resolve(inner: Any) -> Any:
            return self._resolve(inner, label, place, scope, parents, macros)

        match value:
            case _Reference():
                return self.build(value, place, scope, parents)
            case _Macro(name="gin.REQUIRED"):
                raise ConfigError(f"{place}: {label} is not set; the file leaves it to you")
            case _Macro(name, rest):
                binding = self.bindings.macros.get(name)
                if binding is None:
                    close = nearest(name, self.bindings.macros)
                    raise ConfigError(f"{place}: there is no macro %{name}{close}")
                if name in macros:
                    raise ConfigError(f"{place}: the macro %{name} refers to itself")
                found = self._resolve(
                    binding.value, label, binding.place, scope, parents, (*macros, name)
                )
                if rest and not isinstance(found, str):
                    raise ConfigError(
                        f"{place}: %{name}/{rest} wants %{name} to be a string, "
                        f"not {describe_value(found)}"
                    )
                return f"{found}/{rest}" if rest else found
            case list() | tuple():
                return type(value)(resolve(inner) for inner in value)
            case dict():
                return {key: resolve(inner) for key, inner in value.items()}
            case _:
                return value


def _required_fields(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is missing and f.default_factory is missing
    ]
