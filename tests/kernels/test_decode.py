import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentx_kernels import reference
from agentx_kernels.attention import attention
from agentx_kernels.decode import decode_attention
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import causal

BATCH, CAPACITY, NUM_NEW, HEADS, KV_HEADS, SIZE, VALUE_SIZE = 3, 11, 4, 4, 2, 8, 6


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (BATCH, NUM_NEW, HEADS, SIZE),
        (BATCH, KV_HEADS, CAPACITY, SIZE),
        (BATCH, KV_HEADS, CAPACITY, VALUE_SIZE),
        (BATCH, KV_HEADS, NUM_NEW, SIZE),
        (BATCH, KV_HEADS, NUM_NEW, VALUE_SIZE),
    ]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


decode = jax.jit(decode_attention)
reference_decode = jax.jit(reference.decode_attention)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, CAPACITY), min_size=BATCH, max_size=BATCH),
    new_lengths=st.lists(st.integers(0, NUM_NEW), min_size=BATCH, max_size=BATCH),
)
def test_new_tokens_match_the_float64_oracle_whatever_the_rows_hold(lengths, new_lengths):
    arrays = inputs()
    counts = {"lengths": np.array(lengths), "new_lengths": np.array(new_lengths)}
    got = decode(*arrays, **counts)
    with jax.enable_x64(True):
        want = reference_decode(*(x.astype(np.float64) for x in arrays), **counts)
        np.testing.assert_allclose(got, np.asarray(want), rtol=0, atol=2e-6)


def test_all_new_tokens_are_real_unless_told_otherwise():
    lengths = np.array([0, 5, 11])
    got = decode(*inputs(), lengths=lengths)
    want = decode(*inputs(), lengths=lengths, new_lengths=np.full(BATCH, NUM_NEW))
    np.testing.assert_array_equal(got, want)


def test_a_new_token_averages_the_filled_columns_and_the_new_ones_up_to_itself():
    q, k_cache, k_new = jnp.zeros((2, 2, 1, 4)), jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 1, 2, 4))
    v_cache = jnp.array([[1.0, 3, 99], [7, 99, 99]]).reshape(2, 1, 3, 1)
    v_new = jnp.array([[5.0, 11], [9, 99]]).reshape(2, 1, 2, 1)
    o = decode(
        q,
        k_cache,
        v_cache,
        k_new,
        v_new,
        lengths=jnp.array([2, 1]),
        new_lengths=jnp.array([2, 1]),
    )
    np.testing.assert_allclose(o[..., 0, 0], [[3, 5], [8, 0]], rtol=1e-6)


def test_feeding_a_row_in_pieces_equals_feeding_it_whole():
    rng = np.random.default_rng(3)
    length = 10
    q = rng.standard_normal((1, length, HEADS, SIZE), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, length, KV_HEADS, SIZE), dtype=np.float32)
    whole = attention(q, k, v, layout=causal(1, length), hardware=hardware("cpu"))
    k_heads, v_heads = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Columns that are not filled hold another request's leftovers.
    k_cache, v_cache = np.full((2, 1, KV_HEADS, length, SIZE), 50, np.float32)
    start = 0
    for piece in (4, 1, 5):
        new = slice(start, start + piece)
        got = decode(
            q[:, new],
            k_cache,
            v_cache,
            k_heads[:, :, new],
            v_heads[:, :, new],
            lengths=np.array([start]),
        )
        np.testing.assert_allclose(got, whole[:, new], atol=2e-6)
        k_cache[:, :, new], v_cache[:, :, new] = k_heads[:, :, new], v_heads[:, :, new]
        start += piece


def test_bfloat16_stays_within_a_hundredth():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    lengths = np.array([0, 5, 11])
    got = decode(*arrays, lengths=lengths)
    want = reference.decode_attention(*(x.astype(jnp.float32) for x in arrays), lengths=lengths)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("place", "shape", "sentence"),
    [
        (0, (BATCH, NUM_NEW, SIZE), "q must have 4 dims"),
        (0, (BATCH, NUM_NEW, 3, SIZE), "3 heads of q are no multiple of the cache's 2 KV heads"),
        (2, (BATCH, KV_HEADS, 7, VALUE_SIZE), r"v_cache must be \(3, 2, 11, 6\)"),
        (3, (BATCH, NUM_NEW, KV_HEADS, SIZE), r"k_new must be \(3, 2, 4, 8\)"),
        (4, (BATCH, KV_HEADS, NUM_NEW, SIZE), r"v_new must be \(3, 2, 4, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(place, shape, sentence):
    arrays = inputs()
    arrays[place] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=sentence):
        decode_attention(*arrays, lengths=np.zeros(BATCH, int))


@pytest.mark.parametrize("name", ["lengths", "new_lengths"])
def test_lengths_have_one_entry_a_row(name):
    counts = {"lengths": np.zeros(BATCH, int), name: np.zeros(BATCH + 1, int)}
    with pytest.raises(ValueError, match=rf"{name} must be \(3,\)"):
        decode_attention(*inputs(), **counts)
