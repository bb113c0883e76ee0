"""The TPU compiler for tests, in a process of its own; skipped where there is none.

What a program compiled to is kept in .aot_cache/, by a hash of all the source that went into it and
of the compiler: nothing that has changed is answered from there. CI starts without.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from agentx_kernels import ahead

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".aot_cache"
# What a program is made from besides the kernels and tests/aot, which all are.
OF_STEPS = ("agentx/*.py", "agentx/model/*.py", "configs/models/*.gin", "benchmarks/memory.py")
SOURCES = {"train_step": OF_STEPS, "whole_step": OF_STEPS, "mesh_of_a_slice": OF_STEPS}


def pytest_collection_modifyitems(items):
    if ahead.find_libtpu() is None:
        missing = pytest.mark.skip(reason="there is no libtpu, the TPU compiler; make test adds it")
        for item in items:
            if "needs_libtpu" in item.fixturenames:
                item.add_marker(missing)


@pytest.fixture(scope="session")
def needs_libtpu():
    """What goes into every answer besides the question."""
    parts = [f"jax {jax.__version__}"]
    library = ahead.find_libtpu()
    parts.append(f"{library} {library.stat().st_size} {library.stat().st_mtime_ns}")
    folders = [ROOT / "kernels", Path(__file__).parent]
    parts += [file.read_text() for folder in folders for file in sorted(folder.rglob("*.py"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.fixture(scope="session")
def remembered(needs_libtpu):
    """remembered(question, ask): what ask() answered to this question of text, now or before."""

    def recall(question, ask):
        key = hashlib.sha256(f"{needs_libtpu} {question}".encode()).hexdigest()
        file = CACHE / f"{key}.json"
        if not file.exists():
            answer = ask()
            CACHE.mkdir(exist_ok=True)
            written = file.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(answer))
            written.replace(file)
        return json.loads(file.read_text())

    return recall


@pytest.fixture(scope="session")
def facts(remembered):
    """facts(program, **arguments): of a program of programs.py, compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *sys.path])
    process = None

    def start():
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("programs.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(line):
        nonlocal process
        process = process or start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:  # a time-out: what it answers late must not be taken for the next
            process.kill()
            process = None
            raise
        assert answer, f"the compiler died of {line}"
        assert "error" not in json.loads(answer), json.loads(answer)["error"]
        return json.loads(answer)["facts"]

    def compiled(program, **arguments):
        line = json.dumps({"program": program, **arguments}, sort_keys=True)
        files = [file for each in SOURCES.get(program, ()) for file in sorted(ROOT.glob(each))]
        source = hashlib.sha256("".join(file.read_text() for file in files).encode()).hexdigest()
        return remembered(f"{line} {source}" if files else line, lambda: ask(line))

    yield compiled
    if process is not None:
        process.kill()
        process.wait()
