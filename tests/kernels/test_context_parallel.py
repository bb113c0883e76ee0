"""Rows, heads and tokens split over eight devices: what one device gives, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agentx_kernels.attention import attention
from agentx_kernels.context_parallel import Split, make_split_plan, split_attention
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, causal, packed, prefix_tree

SPLIT = Split(("data",), "tensor", "context")
BATCH, LENGTH = 2, 512

LAYOUTS = {
    "causal": causal(BATCH, LENGTH),
    "packed": packed([[100, 250, 150], [13] * 39], LENGTH),
    "trees": prefix_tree([[(200, ROOT), (150, 0), (160, 0)], [(9, ROOT), (300, 0)]], LENGTH),
}
FEATURES = {"plain": {}, "window and softcap": {"window": 70, "softcap": 5.0}}


def inputs(size):
    rng = np.random.default_rng(0)
    shapes = [(4, size), (2, size), (2, size), (4, size)]
    arrays = [rng.standard_normal((BATCH, LENGTH, *shape), dtype=np.float32) for shape in shapes]
    return [*arrays[:3], rng.standard_normal(4, dtype=np.float32), arrays[3]]


def with_gradients(attend, layout, q, k, v, sinks, do):
    o, vjp = jax.vjp(lambda *x: attend(*x, layout), q, k, v, sinks)
    return o, *vjp(do)


def on_one(on, given, q, k, v, sinks, layout):
    return attention(q, k, v, sinks=sinks, layout=layout, **on, **given)


def on_eight(on, given, q, k, v, sinks, layout):
    given = dict(given)
    chip = on["hardware"]
    plan = make_split_plan(layout, SPLIT, hardware=chip, window=given.pop("window", None))
    return split_attention(
        q, k, v, sinks=sinks, layout=layout, plan=plan, split=SPLIT, **on, **given
    )


def mesh_of(data, tensor, context):
    names = ("data", "tensor", "context")
    return jax.make_mesh((data, tensor, context), names, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (2, 1, 4)])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_give_what_one_gives(layout, feature, sizes):
    on = {"hardware": hardware("cpu")}
    compare(on, FEATURES[feature], LAYOUTS[layout], sizes, inputs(8))


def test_eight_devices_with_the_kernels_for_tpu_give_what_one_gives():
    on = {"hardware": hardware("v5p"), "interpret": True}
    compare(on, FEATURES["window and softcap"], LAYOUTS["trees"], (2, 2, 2), inputs(64))


def compare(on, given, layout, sizes, arrays):
    mesh = mesh_of(*sizes)
    want = jax.jit(functools.partial(with_gradients, functools.partial(on_one, on, given)))(
        layout, *arrays
    )
    tokens = NamedSharding(mesh, PartitionSpec("data", "context"))
    heads = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
    places = [heads, heads, heads, NamedSharding(mesh, PartitionSpec("tensor")), heads]
    sharded = [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(functools.partial(with_gradients, functools.partial(on_eight, on, given)))
        got = run(jax.device_put(layout, tokens), *sharded)
    for name, x, y in zip(("o", "dq", "dk", "dv", "dsinks"), got, want, strict=True):
        scale = max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * scale, err_msg=name)
