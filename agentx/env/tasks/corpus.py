"""Source code as a small library that tools can search: files, lines, and functions.

Two ways to one: the Python standard library of the interpreter that runs this (real text on every
machine), and made-up files whose names nobody can have learnt by heart.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import re
import string
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "dev", "held_out"]

# Not part of the library that people read, or not there on every machine.
_LEFT_OUT_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "turtledemo",
    }
)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Function:
    """Where a function is defined. `first_parameter` is empty where there is none on that line."""

    name: str
    path: str
    line: int
    signature: str
    first_parameter: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Lines by path (line 1 is `files[path][0]`) and the functions they define, by file."""

    files: dict[str, Sequence[str]]
    functions: dict[str, tuple[Function, ...]]

    def __post_init__(self) -> None:
        where: dict[str, list[Function]] = {}
        for functions in self.functions.values():
            for function in functions:
                where.setdefault(function.name, []).append(function)
        object.__setattr__(self, "_where", where)

    def find(self, name: str) -> list[Function]:
        """All definitions of `name`, in the order of the files."""
        found: dict[str, list[Function]] = self.__dict__["_where"]
        return found.get(name, [])

    def text(self, path: str) -> str:
        return "\n".join(self.files[path])

    def words(self) -> set[str]:
        """Every identifier-like word that occurs anywhere in the files or their paths."""
        found: set[str] = set()
        for path in self.files:
            found.update(_WORD.findall(path))
            found.update(_WORD.findall(self.text(path)))
        return found


def split_of(path: str) -> Split:
    """The split of a file, by a hash of its path: 70 % train, 10 % dev, 20 % held out."""
    bucket = hashlib.sha256(path.encode()).digest()[0] / 256
    if bucket < 0.7:
        return "train"
    return "dev" if bucket < 0.8 else "held_out"


def _functions_of(path: str, lines: Sequence[str]) -> Iterator[Function]:
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.FunctionDef):
            continue
        signature = lines[node.lineno - 1].strip()
        names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
        names = [n for n in names if n not in ("self", "cls")]
        on_line = bool(names) and re.search(rf"[(,] ?{re.escape(names[0])}\b", signature)
        yield Function(node.name, path, node.lineno, signature, names[0] if on_line else "")


@functools.cache
def _everything(root: Path) -> Corpus:
    files: dict[str, Sequence[str]] = {}
    functions: dict[str, tuple[Function, ...]] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if _LEFT_OUT_FOLDERS.intersection(file.relative_to(root).parts):
            continue
        try:
            # Not splitlines, which cuts at form feeds too: the parser does not count those.
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            found = sorted(_functions_of(path, lines), key=lambda f: f.line)
        except (UnicodeDecodeError, SyntaxError):
            continue
        files[path] = lines
        functions[path] = tuple(found)
    return Corpus(files, functions)


def standard_library(split: Split, root: Path | None = None) -> Corpus:
    """The library's source files of one split: about 11 MB in 580 files for CPython 3.11, in all.

    Files that are not UTF-8 or do not parse are left out: the library's own tests have some.
    Raises ValueError where `root` (the interpreter's own library if None) has no source.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    everything = _everything(root)
    files = {p: lines for p, lines in everything.files.items() if split_of(p) == split}
    if not files:
        raise ValueError(f"{root} holds no Python source of the {split} split")
    return Corpus(files, {p: everything.functions[p] for p in files})


class _SparseLines(Sequence[str]):
    """Lines of a made-up file: only the definitions have text."""

    def __init__(self, length: int, text: dict[int, str]):
        self._length, self._text = length, text

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._text.get(index, "")


def made_up_name(rng: np.random.Generator, fragments: Sequence[str]) -> str:
    """A name such as `get_tarnok_of2` of one to four fragments, some with capitals or digits.

    `fragments` are pieces of real identifiers: so the made-up names look like real ones to a
    tokenizer, though few of them are. They also repeat themselves as often ("_of_", "_of_"), which
    is what makes a name hard to copy.
    """
    style = rng.random()
    num_parts = 1 + int(3.3 * rng.random() ** 1.3)
    parts = [fragments[int(rng.integers(len(fragments)))] for _ in range(num_parts)]
    if style < 0.6:
        name = "_".join(parts)
    elif style < 0.75:
        name = "".join(parts)
    elif style < 0.9:
        name = parts[0] + "".join(p.capitalize() for p in parts[1:])
    else:
        name = "_" + "_".join(parts)
    if rng.random() < 0.12:
        name += str(rng.integers(100))
    if rng.random() < 0.05:
        name = name.upper()
    return name


def _made_up_parameter(rng: np.random.Generator, fragments: Sequence[str]) -> str:
    """A single letter, which every seventh parameter in the library is, a word or a longer name."""
    if rng.random() < 0.15:
        return string.ascii_lowercase[int(rng.integers(26))]
    if rng.random() < 0.6:
        return fragments[int(rng.integers(len(fragments)))]
    return made_up_name(rng, fragments)


def name_fragments(corpus: Corpus) -> list[str]:
    """Pieces of the corpus' identifiers, and a quarter as many of random letters, for names."""
    rng = np.random.Generator(np.random.Philox(key=7))
    found: set[str] = set()
    for functions in corpus.functions.values():
        for function in functions:
            for part in re.findall(r"[A-Z]?[a-z]+", f"{function.name} {function.first_parameter}"):
                if len(part) >= 2:
                    found.add(part.lower())
    letters = string.ascii_lowercase
    noise = {
        "".join(letters[i] for i in rng.integers(26, size=rng.integers(1, 6)))
        for _ in range(len(found) // 4)
    }
    return sorted(found | noise)


def made_up(rng: np.random.Generator, fragments: Sequence[str], num_files: int = 4) -> Corpus:
    """A small corpus of invented files, five functions each, on invented lines."""
    files: dict[str, Sequence[str]] = {}
    functions: dict[str, tuple[Function, ...]] = {}
    for _ in range(num_files):
        folder = made_up_name(rng, fragments) + "/" if rng.random() < 0.6 else ""
        path = f"{folder}{made_up_name(rng, fragments)}.py"
        # Lengths as skewed as real ones: half the definitions stand before line 400.
        length = int(10 + 3000 * rng.random() ** 3)
        lines = sorted(int(x) for x in set(rng.integers(1, length + 1, size=5)))
        found = []
        for line in lines:
            name = made_up_name(rng, fragments)
            num_parameters = 1 + int(2.5 * rng.random() ** 2)
            names = [_made_up_parameter(rng, fragments) for _ in range(num_parameters)]
            parameters = ", ".join(n + ("=None" if rng.random() < 0.2 else "") for n in names)
            owner = "self, " if rng.random() < 0.3 else ""
            signature = f"def {name}({owner}{parameters}):"
            found.append(Function(name, path, line, signature, names[0]))
        files[path] = _SparseLines(length, {f.line - 1: f.signature for f in found})
        functions[path] = tuple(found)
    return Corpus(files, functions)
