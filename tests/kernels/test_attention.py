import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_layouts import rows_of_forests

from agentx_kernels import reference
from agentx_kernels.attention import attention
from agentx_kernels.blocks import BlockConfig
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, TreeLayout, causal, packed, prefix_tree
from agentx_kernels.plan import make_plan

CPU = hardware("cpu")
BATCH, LENGTH, SIZE = 2, 37, 8

# Heads, KV heads, value size, block size: one block, several, one token a block; G of 1, 2 and 3.
CASES = [(2, 2, 8, 64), (4, 2, 8, 16), (3, 1, 12, 8), (2, 1, 8, 1)]


def inputs(heads, kv_heads, value_size, length=LENGTH, batch=BATCH, seed=0):
    """q, k, v and the output's cotangent, f32."""
    rng = np.random.default_rng(seed)
    shapes = [(heads, SIZE), (kv_heads, SIZE), (kv_heads, value_size), (heads, value_size)]
    return [rng.standard_normal((batch, length, *shape), dtype=np.float32) for shape in shapes]


def blocks(size):
    return None if size is None else BlockConfig(size, size)


@functools.cache
def with_gradients(block_size):
    def run(layout, q, k, v, do):
        def attend(q, k, v):
            return attention(q, k, v, layout=layout, hardware=CPU, config=blocks(block_size))

        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return jax.jit(run)


@jax.jit
def reference_with_gradients(layout, q, k, v, do):
    o, vjp = jax.vjp(lambda q, k, v: reference.attention(q, k, v, layout=layout), q, k, v)
    return o, *vjp(do)


def oracle(layout, *arrays):
    """The float64 answer: o, dq, dk, dv."""
    with jax.enable_x64(True):
        answer = reference_with_gradients(layout, *(np.asarray(x, np.float64) for x in arrays))
        return [np.asarray(x) for x in answer]


def assert_close(got, want, tolerance=2e-6):
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(("heads", "kv_heads", "value_size", "block_size"), CASES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows_of_forests(BATCH, LENGTH))
def test_values_and_gradients_match_the_float64_oracle_on_random_forests(
    heads, kv_heads, value_size, block_size, rows
):
    layout = prefix_tree(rows, LENGTH)
    arrays = inputs(heads, kv_heads, value_size)
    assert_close(with_gradients(block_size)(layout, *arrays), oracle(layout, *arrays))


@pytest.mark.parametrize(
    "layout",
    [
        causal(BATCH, LENGTH),
        packed([[1] * LENGTH, [16, 16, 5]], LENGTH),
        packed([[], [LENGTH - 1]], LENGTH),
        prefix_tree([[(15, ROOT), (11, 0), (11, 0)], [(1, ROOT), (36, 0)]], LENGTH),
    ],
    ids=["causal", "one-token documents", "an empty row", "trees"],
)
@pytest.mark.parametrize("block_size", [64, 16])
def test_values_and_gradients_match_the_float64_oracle_on_edges(layout, block_size):
    arrays = inputs(4, 2, 8)
    assert_close(with_gradients(block_size)(layout, *arrays), oracle(layout, *arrays))


def test_documents_and_branches_average_only_the_values_that_they_see():
    layout = prefix_tree([[(2, ROOT), (1, 0), (1, 0), (1, ROOT)]], 6)
    zeros = jnp.zeros((1, 6, 1, 4))
    v = jnp.array([1.0, 3, 5, 8, 100, 1000]).reshape(1, 6, 1, 1)
    o = attention(zeros, zeros, v, layout=layout, hardware=CPU, config=blocks(2))
    np.testing.assert_allclose(o.ravel(), [1, 2, 3, 4, 100, 0], rtol=1e-6)


def test_a_token_that_sees_nothing_gets_zero_and_passes_no_gradient():
    layout = packed([[], [3]], LENGTH)
    for block_size in (64, 16):
        for x in with_gradients(block_size)(layout, *inputs(4, 2, 8)):
            np.testing.assert_array_equal(x[0], np.zeros_like(x[0]))
            np.testing.assert_array_equal(x[1, 3:], np.zeros_like(x[1, 3:]))
            assert np.abs(x[1, :3]).max() > 0


@pytest.mark.parametrize("level", [-300.0, 300.0])
@pytest.mark.parametrize("block_size", [64, 16])
def test_gradients_stay_right_where_the_log_sum_exp_is_far_from_zero(level, block_size):
    q, k, v, do = inputs(4, 2, 8)
    size = (abs(level) * SIZE**0.5) ** 0.5
    q[..., 0], k[..., 0] = size, math.copysign(size, level)
    layout = packed([[20, 10], [37]], LENGTH)
    got = with_gradients(block_size)(layout, q, k, v, do)
    # Scores near 300 carry an f32 rounding error of 1e-5 into the exponent.
    assert_close(got, oracle(layout, q, k, v, do), tolerance=1e-4)


def test_columns_may_be_permuted_when_the_layout_carries_their_index():
    layout = prefix_tree([[(9, ROOT), (11, 0), (11, 0)], [(20, ROOT), (10, ROOT)]], LENGTH)
    arrays = inputs(4, 2, 8)
    order = np.random.default_rng(1).permutation(LENGTH)
    permuted = TreeLayout(*(np.asarray(x)[:, order] for x in layout))
    got = with_gradients(16)(permuted, *(x[:, order] for x in arrays))
    assert_close(got, [x[:, order] for x in oracle(layout, *arrays)])


def test_bfloat16_stays_within_a_hundredth():
    layout = packed([[20, 10], [37]], LENGTH)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(4, 2, 8)]
    for block_size in (64, 16):
        got = with_gradients(block_size)(layout, *arrays)
        assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
        assert_close(got, oracle(layout, *arrays), tolerance=1e-2)


def test_the_scale_multiplies_the_scores():
    q, k, v, _ = inputs(2, 2, 8)
    layout = causal(BATCH, LENGTH)
    got = attention(q, k, v, layout=layout, hardware=CPU, scale=0.5)
    want = attention(q * (0.5 * SIZE**0.5), k, v, layout=layout, hardware=CPU)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_memory_grows_with_the_length_and_never_with_its_square():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        layout = TreeLayout(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 3)
        compiled = with_gradients(None).lower(layout, x, x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 4.5 * short
    assert long < 16384 * 16384 / 32


def test_rows_and_heads_split_over_eight_devices_without_gathering():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    layout = packed([[20, 10], [37], [5, 5], [30, 7]], LENGTH)
    arrays = inputs(4, 2, 8, batch=4)
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    by_head = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    sharded = (
        jax.device_put(layout, by_row),
        *(jax.device_put(x, by_head) for x in arrays),
    )
    compiled = with_gradients(16).lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(*sharded), with_gradients(16)(layout, *arrays))


def good_arguments():
    q, k, v, _ = (jnp.asarray(x) for x in inputs(4, 2, 8))
    return {"q": q, "k": k, "v": v, "layout": causal(BATCH, LENGTH), "hardware": CPU}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": jnp.zeros((2, 37, 8))}, "4 dims"),
        ({"k": jnp.zeros((2, 36, 2, 8))}, "k and v the length"),
        ({"q": jnp.zeros((2, 37, 3, 8))}, "number of heads"),
        ({"v": jnp.zeros((2, 37, 1, 8))}, "number of heads"),
        ({"k": jnp.zeros((2, 37, 2, 4))}, "one head size"),
        ({"v": jnp.zeros((2, 37, 2, 0))}, "may be 0"),
        ({"v": jnp.zeros((2, 37, 2, 8), jnp.bfloat16)}, "floating-point type.*cast"),
        ({"layout": causal(2, 36)}, r"layout.index must be integers \(2, 37\)"),
        ({"layout": causal(1, 37)}, r"layout.index must be integers \(2, 37\)"),
        ({"hardware": "cpu"}, "hardware is 'cpu'; give a Hardware"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"sinks": jnp.zeros(2)}, r"one value a head, \(4,\), not \(2,\)"),
        ({"plan": make_plan(causal(BATCH, LENGTH), config=blocks(8))}, "the plan was made for"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        attention(**(good_arguments() | change))
    assert "\n" not in str(error.value)


def test_a_block_without_tokens_is_refused():
    with pytest.raises(ValueError, match="1 token or more"):
        BlockConfig(0, 8)
