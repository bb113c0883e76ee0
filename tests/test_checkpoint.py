"""Checkpoints come back bit for bit, on any devices, or are named and passed over."""

import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentx import checkpoint
from agentx.checkpoint import CheckpointStore, newest_checkpoint, restore_params


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(seed: int, sharding: Any = None) -> State:
    key = jax.random.key(seed)
    kernel = jax.random.normal(key, (16, 8))
    if sharding is not None:
        kernel = jax.device_put(kernel, sharding)
    params = nnx.State({"layer": {"kernel": nnx.Param(kernel), "bias": nnx.Param(jnp.ones(8))}})
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 1 else x, params)
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(params))


def abstract(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def filled(directory: Any, *steps: int, keep: int = 5) -> Any:
    with CheckpointStore(directory, keep=keep) as store:
        for step in steps:
            store.save(step, make_state(step), {"position": step})
    return directory


def one_data_file(folder: Any) -> Any:
    return max(folder.glob("state/**/d/*"), key=lambda p: p.stat().st_size)


def test_a_state_comes_back_bit_identical_with_its_extras(tmp_path):
    state = make_state(3)
    extras = {"seed": 7, "config": "a = 1\n", "nested": {"list": [1, 2.5, None]}}
    with CheckpointStore(tmp_path) as store:
        store.save(3, state, extras)
        restored = store.restore(abstract(state))
    assert_same_bits(restored.state, state)
    assert (restored.step, restored.extras) == (3, extras)
    assert newest_checkpoint(tmp_path)[1:] == (3, extras)


def test_a_fresh_directory_restores_none(tmp_path):
    with CheckpointStore(tmp_path / "new" / "deep") as store:
        assert store.restore(abstract(make_state(0))) is None
        assert store.latest() is None


def test_the_newest_keep_checkpoints_stay(tmp_path):
    filled(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = [jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)]
    wanted = [jnp.copy(x) for x in state]
    shapes = abstract(state)
    with CheckpointStore(tmp_path) as store:
        store.save(0, state, {})
        for _ in range(3):
            state = double(state)
        jax.block_until_ready(state)
        assert_same_bits(store.restore(shapes).state, wanted)


@pytest.mark.parametrize(("num_writers", "num_readers"), [(8, 1), (1, 8), (8, 4)])
def test_another_number_of_devices_reads_the_same_bits(tmp_path, num_writers, num_readers):
    def rows(num_devices):
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))
        return NamedSharding(mesh, PartitionSpec("fsdp"))

    kernel = jax.device_put(jnp.arange(64.0).reshape(16, 4), rows(num_writers))
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"params": {"kernel": kernel}}, {})
        wanted = abstract({"params": {"kernel": kernel}}, rows(num_readers))
        found = store.restore(wanted).state["params"]["kernel"]
    assert found.sharding == rows(num_readers)
    assert len(found.addressable_shards) == num_readers
    assert_same_bits(found, kernel)


def test_params_are_read_alone_as_numpy_or_sharded(tmp_path):
    filled(tmp_path, 5)
    params = make_state(5).params
    saved = newest_checkpoint(tmp_path)
    assert (saved.step, saved.extras) == (5, {"position": 5})
    assert_same_bits(restore_params(saved, abstract(params)), params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    on_host = restore_params(saved, shapes)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))
    assert_same_bits(on_host, params)


def truncate(folder):
    os.truncate(one_data_file(folder), 10)
    return "has 10 bytes instead of"


def flip_a_byte(folder):
    path = one_data_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "has other bytes than were written"


def remove_a_file(folder):
    one_data_file(folder).unlink()
    return "is missing"


def remove_checksums(folder):
    (folder / "checksums.json").unlink()
    return "checksums.json cannot be read: No such file"


def garble_checksums(folder):
    (folder / "checksums.json").write_text("[1, 2")
    return "checksums.json is not what was written"


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, remove_a_file, remove_checksums, garble_checksums]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    filled(tmp_path, 1, 2)
    reason = damage(tmp_path / "step_00000002")
    with CheckpointStore(tmp_path, keep=2) as store, caplog.at_level(logging.WARNING):
        restored = store.restore(abstract(make_state(1)))
        assert restored.step == 1
        assert_same_bits(restored.state, make_state(1))
        assert "step_00000002 is damaged" in caplog.text
        assert reason in caplog.text
        store.save(2, make_state(2), {"position": 2})
        assert store.restore(abstract(make_state(2))).step == 2


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path):
    filled(tmp_path, 1, 2, 3)
    truncate(tmp_path / "step_00000003")
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.restore(abstract(make_state(2))).step == 2
        store.save(4, make_state(4), {})
        store.wait()
        assert store.steps() == [4]


def test_when_all_are_damaged_the_error_says_so(tmp_path):
    filled(tmp_path, 1, 2)
    truncate(tmp_path / "step_00000001")
    flip_a_byte(tmp_path / "step_00000002")
    all_damaged = r"every checkpoint in .* is damaged \(step 1, 2\)"
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match=all_damaged):
        store.restore(abstract(make_state(1)))
    with pytest.raises(ValueError, match=all_damaged):
        newest_checkpoint(tmp_path)


KILLED = """
import sys, jax.numpy as jnp
from agentx.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=2)
for step in range(1, 10):
    store.save(step, {"params": [jnp.full((1024, 1024), step * 8.0 + i) for i in range(12)]}, {})
    print(step, flush=True)
"""


@pytest.mark.parametrize("kill_at", [1, 4])
def test_a_save_cut_short_by_kill_9_leaves_the_one_before(tmp_path, caplog, kill_at):
    script = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < kill_at:
            pass
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / f"step_{kill_at:08d}.partial").exists()
    shapes = {"params": [jax.ShapeDtypeStruct((1024, 1024), np.float32)] * 12}
    with CheckpointStore(tmp_path) as store:
        restored = store.restore(shapes)
        assert f"step_{kill_at:08d}.partial is half-written" in caplog.text
        if kill_at == 1:
            assert restored is None
        else:
            assert restored.step == kill_at - 1
            for i, leaf in enumerate(restored.state["params"]):
                assert (leaf == restored.step * 8.0 + i).all()
        store.save(kill_at, {"params": [np.zeros(3)]}, {})
    assert not list(tmp_path.glob("*.partial"))


def test_saving_returns_before_the_files_are_written(tmp_path, monkeypatch):
    slow = checkpoint._checksums

    def slowly(folder):
        time.sleep(1.0)
        return slow(folder)

    monkeypatch.setattr(checkpoint, "_checksums", slowly)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.ones(3)}, {})
        assert store.steps() == []
        store.wait()
        assert store.steps() == [1]


def test_a_save_that_hangs_is_named_after_its_time_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_checksums", lambda folder: time.sleep(2.0) or {})
    store = CheckpointStore(tmp_path, timeout_s=1.0)
    store.save(8, {"x": jnp.ones(3)}, {})
    with pytest.raises(TimeoutError, match=r"saving step 8 to .* took more than 1 s"):
        store.wait()


def test_a_save_that_fails_raises_at_the_next_wait(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_checksums", full)
    with CheckpointStore(tmp_path) as store:
        store.save(8, {"x": jnp.ones(3)}, {})
        with pytest.raises(OSError, match="No space left"):
            store.wait()
        assert store.restore({"x": jax.ShapeDtypeStruct((3,), np.float32)}) is None


def test_a_run_that_was_not_resumed_cannot_write_over_another(tmp_path):
    filled(tmp_path, 7)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(ValueError, match="has a checkpoint of step 7 already"):
            store.save(3, make_state(3), {})
        store.save(8, make_state(8), {})
        store.save(8, make_state(8), {})
        store.wait()
        assert store.steps() == [7, 8]


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"is no directory of checkpoints: it holds 'thesis.tex'"):
        CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        CheckpointStore(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="there is no directory of checkpoints at"):
        newest_checkpoint(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        newest_checkpoint(tmp_path / "empty")


def test_another_model_is_refused_by_the_first_array_that_differs(tmp_path):
    filled(tmp_path, 1)

    def model(name, shape):
        return nnx.State({"layer": {name: nnx.Param(jax.ShapeDtypeStruct(shape, np.float32))}})

    saved = newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"params/layer/kernel.* is float32\[16, 8\], and float32"):
        restore_params(saved, model("kernel", (16, 9)))
    with pytest.raises(ValueError, match="it has no params/layer/gate"):
        restore_params(saved, model("gate", (16, 8)))
    with pytest.raises(ValueError, match=r"it has params/layer/bias.*, not asked for"):
        restore_params(saved, model("kernel", (16, 8)))


def test_extras_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(TypeError, match="not JSON"):
        store.save(1, {"x": jnp.ones(3)}, {"set": {1}})
    assert not list(tmp_path.iterdir())
