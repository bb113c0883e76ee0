"""What a process sets for its CPU; asked of fresh processes, for it comes before JAX begins."""

import os
import subprocess
import sys

import pytest

from agentx.model import ModelConfig
from agentx.sharding import MeshConfig

COUNT = "from agentx.host import prepare_cpu; prepare_cpu(3); import jax; print(len(jax.devices()))"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env = {**inherited, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_cpu_becomes_as_many_devices_as_were_asked_for():
    assert run(COUNT).stdout == "3\n"


def test_one_device_is_what_there_is_anyway():
    done = run("import jax; jax.devices(); " + COUNT.replace("3", "1"))
    assert done.stdout == "1\n"


def test_xla_flags_go_before_what_was_asked_for():
    done = run(COUNT, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.stdout == "2\n"


def test_once_jax_has_devices_it_is_too_late():
    done = run("import jax; jax.devices(); " + COUNT)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr


def test_fresh_parameters_drawn_to_copy_are_made_on_two_devices_too():
    code = (
        "from agentx.host import prepare_cpu; prepare_cpu(2)\n"
        "import jax, numpy as np\n"
        "from agentx.model import ModelConfig, abstract_transformer\n"
        "from agentx.optim import OptimizerConfig, make_optimizer\n"
        "from agentx.sharding import MeshConfig, make_mesh\n"
        "from agentx.step import init_state\n"
        "model = abstract_transformer(ModelConfig(64, 32, 2, 4, 2, 8, 48, init='copy'))\n"
        "optimizer = make_optimizer(OptimizerConfig(), 1)\n"
        "draw = lambda n: jax.device_get(init_state(model, optimizer,\n"
        "    make_mesh(MeshConfig(), jax.devices()[:n]), jax.random.key(0)).params)\n"
        "jax.tree.map(np.testing.assert_array_equal, draw(1), draw(2))\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="cpu_devices is 0; it must be 1 or more"):
        MeshConfig(cpu_devices=0)
    with pytest.raises(ValueError, match="init is 'best'; choose one of normal, copy"):
        ModelConfig(64, 32, 2, 4, 2, 8, 48, init="best")
