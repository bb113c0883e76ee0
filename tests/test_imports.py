"""Imports point one way, and a few things are nowhere in the tree. Nothing is imported here: the
source is parsed, so that an import inside a function counts too, unless it says otherwise."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"agentx": ROOT / "agentx", "agentx_kernels": ROOT / "kernels" / "agentx_kernels"}

# Room -> the rooms it may import besides itself, as docs/design.md says. A room is a module or a
# package of agentx; "kernels" is all of agentx_kernels.
MAY_IMPORT = {
    "kernels": "",
    "trajectory": "",
    "batch": "kernels",
    "sharding": "",
    "optim": "",
    "metrics": "",
    "host": "",
    "checkpoint": "",
    "streamed": "",
    "tokenizer": "",
    "advantages": "",
    "render": "tokenizer trajectory",
    "model": "kernels sharding",
    "data": "trajectory batch render tokenizer kernels",
    "losses": "batch",
    "step": "model losses optim sharding batch kernels",
    "sample": "model sharding kernels",
    "env": "trajectory",
    "rollout": "sample env render trajectory",
    "eval": "rollout env render sample metrics trajectory",
    "source": "data rollout advantages batch render tokenizer trajectory model sample env kernels",
    "interop": "model tokenizer kernels",
    "report": "metrics eval trajectory",
    "parameters": "checkpoint model sharding tokenizer",
    "train": "parameters step source checkpoint metrics model losses optim sample sharding "
    "tokenizer",
}
EVERYTHING = {"quickstart", "sweep", "cli"}


@functools.cache
def sources() -> list[Path]:
    return [file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))]


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def module_name(file: Path) -> str:
    for package, folder in PACKAGES.items():
        if file.is_relative_to(folder):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            return ".".join(parts).removesuffix(".__init__")
    raise AssertionError(file)


def room(module: str) -> str:
    package, *inner = module.split(".")
    if package == "agentx_kernels":
        return "kernels"
    return inner[0] if inner else ""


def imports(file: Path, *, top_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; `from a import b` is a.b where that is a module of ours."""
    tree = parse(file)
    ours = {module_name(other) for other in sources()}
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import: write it in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in ours else str(node.module)


def test_every_module_imports_only_what_its_room_may():
    wrong = []
    for file in sources():
        here = room(module_name(file))
        if here in EVERYTHING or not here:
            continue
        assert here in MAY_IMPORT, (
            f"{file}: add the room {here!r} to the table and to docs/design.md"
        )
        allowed = {here, "", *MAY_IMPORT[here].split()}
        wrong += [
            f"{file.relative_to(ROOT)}:{line} imports {module}"
            for line, module in imports(file)
            if module.split(".")[0] in PACKAGES and room(module) not in allowed
        ]
    assert wrong == []


def test_the_table_of_rooms_has_no_circle():
    done: set[str] = set()
    waiting = {name: set(rooms.split()) for name, rooms in MAY_IMPORT.items()}
    while ready := {name for name, rooms in waiting.items() if rooms <= done}:
        done |= ready
        for name in ready:
            del waiting[name]
    assert waiting == {}


def test_only_the_edge_imports_gin():
    users = [
        str(file.relative_to(ROOT))
        for file in sources()
        if any(module.split(".")[0] == "gin" for _, module in imports(file))
    ]
    assert users == ["agentx/cli/config.py"]


def loaded_by(module: str) -> set[str]:
    """The top-level modules that importing one of ours loads; ours are followed further."""
    files = {module_name(file): file for file in sources()}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in files:
            waiting += [inner for _, inner in imports(files[name], top_level_only=True)]
    return {name.split(".")[0] for name in seen}


@pytest.mark.parametrize(
    "module", ["agentx", "agentx.trajectory", "agentx.cli.main", "agentx.env.base"]
)
def test_light_modules_load_no_jax(module):
    assert not loaded_by(module) & {"jax", "flax", "optax", "orbax", "tensorstore", "torch"}


def test_the_command_line_loads_no_numpy():
    assert "numpy" not in loaded_by("agentx.cli.main")


def test_nothing_pickles_and_nothing_starts_a_shell():
    wrong = []
    for file in sources():
        modules = {module.split(".")[0] for _, module in imports(file)}
        if modules & {"pickle", "dill", "cloudpickle", "shelve"}:
            wrong.append(f"{file} pickles")
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                wrong.append(f"{file}:{node.value.lineno} passes shell=")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.system", "os.popen"):
                wrong.append(f"{file}:{node.lineno} calls {ast.unparse(node)}")
    assert wrong == []


def test_no_file_is_called_utils():
    assert [file for file in sources() if file.stem in ("utils", "util", "helpers", "misc")] == []
