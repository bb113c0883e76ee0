"""Windows, soft caps, sinks and the log-sum-exp, on every path, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_layouts import rows_of_forests

from agentx_kernels import reference
from agentx_kernels.attention import attention
from agentx_kernels.blocks import BlockConfig
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, prefix_tree

BATCH = 2

# How each path is run here, and the length and blocks that make it take several of each.
PATHS = {
    "xla": ({"hardware": hardware("cpu")}, 37, BlockConfig(16, 8)),
    "tpu": ({"hardware": hardware("v5p"), "interpret": True}, 300, BlockConfig(128, 128)),
}
FEATURES = {
    "plain": {},
    "window": {"window": 11},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 29, "softcap": 3.0, "sinks": True, "scale": 0.4},
}
NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")


def inputs(path, heads=4, kv_heads=2, seed=0):
    """q, k, v, sinks and the cotangents of o and lse, f32."""
    length, size, value_size = (PATHS[path][1], *((8, 12) if path == "xla" else (128, 64)))
    rng = np.random.default_rng(seed)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size)]
    q, k, v, do = (
        rng.standard_normal((BATCH, length, *shape), dtype=np.float32)
        for shape in (*shapes, (heads, value_size))
    )
    dlse = rng.standard_normal((BATCH, length, heads), dtype=np.float32)
    return q, k, v, rng.standard_normal(heads, dtype=np.float32), do, dlse


def with_gradients(attend, feature):
    given_ = FEATURES[feature]

    def run(layout, q, k, v, sinks, do, dlse):
        def f(q, k, v, sinks):
            extra = {"sinks": sinks} if "sinks" in given_ else {}
            rest = {name: x for name, x in given_.items() if name != "sinks"}
            o, lse = attend(q, k, v, layout=layout, return_lse=True, **rest, **extra)
            return o, jnp.where(lse == -jnp.inf, 0, lse)

        (o, lse), vjp = jax.vjp(f, q, k, v, sinks)
        return o, lse, *vjp((do, dlse))

    return jax.jit(run)


@functools.cache
def ours(path, feature):
    on, _, config = PATHS[path]
    return with_gradients(functools.partial(attention, config=config, **on), feature)


@functools.cache
def theirs(feature):
    return with_gradients(reference.attention, feature)


def oracle(feature, layout, *arrays):
    with jax.enable_x64(True):
        answer = theirs(feature)(layout, *(np.asarray(x, np.float64) for x in arrays))
        return [np.asarray(x) for x in answer]


def assert_close(got, want, tolerance=2e-6):
    for name, x, y in zip(NAMES, got, want, strict=True):
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("feature", FEATURES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows_of_forests(BATCH, 37))
def test_xla_matches_the_oracle_on_random_forests(feature, rows):
    layout, arrays = prefix_tree(rows, 37), inputs("xla")
    assert_close(ours("xla", feature)(layout, *arrays), oracle(feature, layout, *arrays))


@pytest.mark.parametrize("feature", FEATURES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows_of_forests(BATCH, 300, max_run=120))
def test_tpu_matches_the_oracle_on_random_forests(feature, rows):
    layout, arrays = prefix_tree(rows, 300), inputs("tpu")
    assert_close(ours("tpu", feature)(layout, *arrays), oracle(feature, layout, *arrays))


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_is_within_a_hundredth_of_the_oracle(path):
    length = PATHS[path][1]
    layout = prefix_tree(
        [[(length // 3, ROOT), (9, 0), (length // 3, 0)], [(length, ROOT)]], length
    )
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs(path)]
    q, k, v, sinks, do, dlse = rounded
    arrays = q, k, v, sinks.astype(jnp.float32), do, dlse.astype(jnp.float32)
    got = ours(path, "all")(layout, *arrays)
    assert [x.dtype for x in got[2:5]] == [jnp.bfloat16] * 3
    assert_close(got, oracle("all", layout, *arrays), tolerance=1e-2)
