"""Compiling for a TPU that is not there. The real compiler, libtpu, runs on any machine.

    prepare()
    mesh = Mesh(np.array(devices("v5p:4x4x4")).reshape(8, 8), ("data", "context"))
    jax.jit(f).lower(ShapeDtypeStructs that lie on the mesh).compile()

What comes out answers `memory_analysis()` and `as_text()`, and cannot be run. libtpu takes 700 MB
and is not installed with the rest: `make` adds it for the tests, `pip install libtpu` (the version
is below) or agentx's extra `aot` elsewhere. A process loads it once, with what `prepare` has set in
its environment; so give such work a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

# The version of libtpu that the tests and the figures go by; constraints.txt pins it.
LIBTPU = "0.0.42.1"

# The smallest slice of each kind that the compiler knows by name.
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# What a host of TPUs would say of itself; without it libtpu asks the network, and waits.
_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def find_libtpu() -> Path | None:
    """The compiler: TPU_LIBRARY_PATH, else as installed, else where `make` puts it; None if not.

    `make` keeps it in a folder of its own, `aot` beside the environment's `lib`. Among the packages
    it is loaded by every process in which JAX looks for devices, and warns that there is no TPU.
    """
    named = os.environ.get("TPU_LIBRARY_PATH")
    package = importlib.util.find_spec("libtpu")
    installed = Path(package.origin).parent if package and package.origin else None
    folders = [installed, Path(sys.prefix) / "aot" / "libtpu"]
    files = [Path(named)] if named else [folder / "libtpu.so" for folder in folders if folder]
    return next((file for file in files if file.exists()), None)


def prepare(dump: Path | None = None) -> None:
    """Sets up this process: first of all, before anything of JAX has looked for devices.

    dump: a folder where the compiler writes the final schedule of all that it compiles, as text.

    Raises ModuleNotFoundError where there is no libtpu.
    """
    library = find_libtpu()
    if library is None:
        raise ModuleNotFoundError(
            f"there is no libtpu to compile with: pip install libtpu=={LIBTPU}, or name the file "
            "libtpu.so in TPU_LIBRARY_PATH"
        )
    os.environ |= _HOST | {"TPU_LIBRARY_PATH": str(library)}
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false "
            f"--xla_jf_dump_llo_pass_label_regex=^final_.*"
        )
    jax.config.update("jax_platforms", "cpu")


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice, such as "v5e:8x8" or "v5p:4x4x4"; of a tpu7x two a chip."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
