"""Rows, heads and tokens split over eight devices: what one device gives, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agentx_kernels.attention import attention
from agentx_kernels.context_parallel import (
    Split,
    choose_split,
    make_split_plan,
    split_attention,
)
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, packed, prefix_tree

SPLIT = Split(("data",), "tensor", "context")
BATCH, LENGTH, HEADS, KV_HEADS = 2, 512, 8, 4

# What is seen, and how.
CASES = {
    "packed": (packed([[100, 250, 150], [13] * 39], LENGTH), {}),
    "trees": (
        prefix_tree([[(200, ROOT), (150, 0), (160, 0)], [(9, ROOT), (300, 0)]], LENGTH),
        {"window": 70, "softcap": 5.0},
    ),
}
# Groups that exchange heads, whether between them is a ring, and devices by rows, heads and tokens.
SPLITS = {
    "all_gather": (1, False, (1, 1, 8)),
    "all_gather, all axes": (1, False, (2, 2, 2)),
    "ulysses": (4, False, (2, 1, 4)),
    "ulysses, all axes": (2, False, (2, 2, 2)),
    "ring": (1, True, (1, 1, 8)),
    "ring, all axes": (1, True, (2, 2, 2)),
    "usp": (2, True, (1, 1, 8)),
    "usp, heads split": (2, True, (1, 2, 4)),
    "groups of two, gathered": (2, False, (1, 1, 8)),
}


def inputs(size, heads=HEADS, kv_heads=KV_HEADS):
    rng = np.random.default_rng(0)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, size), (heads, size)]
    arrays = [rng.standard_normal((BATCH, LENGTH, *shape), dtype=np.float32) for shape in shapes]
    return [*arrays[:3], rng.standard_normal(heads, dtype=np.float32), arrays[3]]


def with_gradients(attend, layout, q, k, v, sinks, do):
    o, vjp = jax.vjp(lambda *x: attend(*x, layout), q, k, v, sinks)
    return o, *vjp(do)


def on_one(on, given, q, k, v, sinks, layout):
    return attention(q, k, v, sinks=sinks, layout=layout, **on, **given)


def on_eight(on, given, split, q, k, v, sinks, layout):
    given = dict(given)
    chip = on["hardware"]
    plan = make_split_plan(layout, split, hardware=chip, window=given.pop("window", None))
    return split_attention(q, k, v, sinks=sinks, plan=plan, **on, **given)


def mesh_of(data, tensor, context):
    names = ("data", "tensor", "context")
    return jax.make_mesh((data, tensor, context), names, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_what_one_gives(case, split):
    compare({"hardware": hardware("cpu")}, *CASES[case], SPLITS[split], inputs(8))


@pytest.mark.parametrize(
    ("split", "heads"),
    # The last: each device keeps four heads in four parts, of which the third and fourth wait.
    [("all_gather, all axes", 4), ("usp, heads split", 4), ("groups of two, gathered", 8)],
)
def test_eight_devices_with_the_kernels_for_tpu_give_what_one_gives(split, heads):
    on = {"hardware": hardware("v5p"), "interpret": True}
    compare(on, *CASES["trees"], SPLITS[split], inputs(64, heads=heads))


def test_the_gradients_of_keys_that_several_parts_attend_to_are_rounded_once():
    on = {"hardware": hardware("cpu")}
    *qkv, sinks, do = inputs(8)
    q, k, v, do = (x.astype(jnp.bfloat16) for x in (*qkv, do))
    compare(on, *CASES["packed"], SPLITS["ulysses"], (q, k, v, sinks, do), tolerance=2**-8)


def compare(on, layout, given, how, arrays, tolerance=0):
    """Equal to 2e-6 of the largest and `tolerance` of each value."""
    ulysses, ring, sizes = how
    split = dataclasses.replace(SPLIT, ulysses=ulysses, ring=ring)
    mesh = mesh_of(*sizes)
    want = jax.jit(functools.partial(with_gradients, functools.partial(on_one, on, given)))(
        layout, *arrays
    )
    tokens = NamedSharding(mesh, PartitionSpec("data", "context"))
    heads = NamedSharding(mesh, PartitionSpec("data", "context", "tensor"))
    places = [heads, heads, heads, NamedSharding(mesh, PartitionSpec("tensor")), heads]
    sharded = [jax.device_put(x, place) for x, place in zip(arrays, places, strict=True)]
    attend = functools.partial(on_eight, on, given, split)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(functools.partial(with_gradients, attend))
        got = run(jax.device_put(layout, tokens), *sharded)
    for name, x, y in zip(("o", "dq", "dk", "dv", "dsinks"), got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (9, 3)])
def test_heads_that_a_group_cannot_share_are_refused(heads, kv_heads):
    layout, given = CASES["packed"]
    with pytest.raises(ValueError, match=f"2 devices cannot share [{heads}{kv_heads}] heads"):
        compare(
            {"hardware": hardware("cpu")},
            layout,
            given,
            SPLITS["groups of two, gathered"],
            inputs(8, heads, kv_heads),
        )


MEMORY = hardware("v5p").hbm_bytes


@pytest.mark.parametrize(
    ("strategy", "devices", "kv_heads", "gathered", "ulysses", "ring"),
    [
        ("auto", 8, 8, 0, 8, False),
        ("auto", 4, 8, 0, 4, False),
        ("auto", 1, 8, 0, 1, False),
        ("auto", 16, 8, MEMORY / 16, 1, False),
        ("auto", 16, 8, MEMORY / 15, 8, True),
        ("auto", 8, 1, MEMORY / 15, 1, True),
        ("auto", 6, 4, MEMORY / 15, 2, True),
        ("all_gather", 8, 8, MEMORY, 1, False),
        ("ring", 8, 8, 0, 1, True),
        ("usp", 8, 2, 0, 2, True),
        ("usp", 1, 1, 0, 1, False),
        ("ring", 1, 1, 0, 1, False),
    ],
)
def test_the_strategy_follows_from_kv_heads_and_memory(
    strategy, devices, kv_heads, gathered, ulysses, ring
):
    split = choose_split(
        strategy,
        SPLIT,
        devices=devices,
        kv_heads=kv_heads,
        gathered_bytes=gathered,
        hardware=hardware("v5p"),
    )
    assert (split.ulysses, split.ring) == (ulysses, ring)


@pytest.mark.parametrize(("strategy", "kv_heads"), [("ulysses", 4), ("usp", 1)])
def test_what_has_too_few_kv_heads_is_refused(strategy, kv_heads):
    with pytest.raises(ValueError, match=f"{strategy} over 8 devices .* choose ring or all_gather"):
        choose_split(
            strategy,
            SPLIT,
            devices=8,
            kv_heads=kv_heads,
            gathered_bytes=0,
            hardware=hardware("v5p"),
        )
