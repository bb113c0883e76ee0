"""Which blocks are visited, skipped and full, against the dense mask."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layouts import rows_of_forests

from agentx_kernels.blocks import BlockConfig
from agentx_kernels.layout import ROOT, TreeLayout, allow, causal, packed, prefix_tree
from agentx_kernels.plan import is_full, make_plan, visited_blocks, visits

BATCH, LENGTH = 2, 37
SIZES = st.sampled_from([(1, 1), (4, 4), (8, 4), (4, 8), (37, 37), (64, 64)])

jitted = jax.jit(make_plan, static_argnames=("config", "window"))


def plans(layout, **given):
    return jax.tree.map(np.asarray, jitted(layout, **given))


def dense(layout, window=None):
    """bool[B, S, S], as the docstrings of layout and plan define it."""
    allowed = np.asarray(allow(layout))
    if window is not None:
        depth = np.asarray(layout.position)
        allowed &= depth[:, :, None] - depth[:, None, :] < window
    return allowed


def in_blocks(mask, query_block, key_block, filling):
    """bool[B, I, J, Q, C]"""
    batch, length, _ = mask.shape
    pads = [(0, 0), (0, -length % query_block), (0, -length % key_block)]
    mask = np.pad(mask, pads, constant_values=filling)
    rows, columns = (mask.shape[1] // query_block, mask.shape[2] // key_block)
    return mask.reshape(batch, rows, query_block, columns, key_block).swapaxes(2, 3)


def full_blocks(plan):
    queries = type(plan.queries)(*(x[:, :, None] for x in plan.queries))
    keys = type(plan.keys)(*(x[:, None, :] for x in plan.keys))
    return np.asarray(is_full(queries, keys, plan.window))


def walk(plan, row, i):
    """The blocks that a kernel visits, found as it finds them: by scalars, from first to last."""
    query = type(plan.queries)(*(int(x[row, i]) for x in plan.queries))
    found, j, steps = [], query.first, 0
    while j <= query.last:
        key = type(plan.keys)(*(int(x[row, j]) for x in plan.keys))
        if visits(query, key, plan.window):
            found.append(j)
            j += 1
        else:
            j = key.skip if key.end_max <= query.index_min else j + 1
        steps += 1
    return found, steps


@settings(max_examples=50, deadline=None)
@given(rows=rows_of_forests(BATCH, LENGTH), sizes=SIZES)
def test_blocks_are_visited_exactly_where_a_query_sees_a_key(rows, sizes):
    layout = prefix_tree(rows, LENGTH)
    plan = plans(layout, config=BlockConfig(*sizes))
    blocks = in_blocks(dense(layout), *sizes, filling=False)
    visited = np.asarray(visited_blocks(plan))
    if sizes[0] == sizes[1]:
        np.testing.assert_array_equal(visited, blocks.any((-1, -2)))
    else:
        assert (visited | ~blocks.any((-1, -2))).all()
    whole = in_blocks(dense(layout), *sizes, filling=False).all((-1, -2))
    np.testing.assert_array_equal(full_blocks(plan), whole)


@settings(max_examples=50, deadline=None)
@given(
    rows=rows_of_forests(BATCH, LENGTH),
    sizes=SIZES,
    window=st.none() | st.integers(1, LENGTH),
)
def test_a_walk_from_first_to_last_meets_every_visited_block_in_order(rows, sizes, window):
    plan = plans(prefix_tree(rows, LENGTH), config=BlockConfig(*sizes), window=window)
    visited = np.asarray(visited_blocks(plan))
    for row in range(BATCH):
        for i, wanted in enumerate(visited[row]):
            found, _ = walk(plan, row, i)
            assert found == np.flatnonzero(wanted).tolist()
        for j, wanted in enumerate(visited[row].T):
            inside = np.flatnonzero(wanted)
            first, last = int(plan.keys.first[row, j]), int(plan.keys.last[row, j])
            assert (first, last) == ((inside[0], inside[-1]) if len(inside) else (len(wanted), -1))


@settings(max_examples=50, deadline=None)
@given(rows=rows_of_forests(BATCH, LENGTH), sizes=SIZES, window=st.integers(1, LENGTH))
def test_with_a_window_no_pair_is_missed_and_no_full_block_holds_a_hidden_pair(rows, sizes, window):
    layout = prefix_tree(rows, LENGTH)
    plan = plans(layout, config=BlockConfig(*sizes), window=window)
    blocks = in_blocks(dense(layout, window), *sizes, filling=False)
    assert (np.asarray(visited_blocks(plan)) | ~blocks.any((-1, -2))).all()
    assert (~full_blocks(plan) | blocks.all((-1, -2))).all()


def test_a_window_over_a_whole_row_visits_a_band():
    plan = plans(causal(1, 64), config=BlockConfig(8, 8), window=9)
    visited = np.asarray(visited_blocks(plan))[0]
    band = np.tril(np.ones((8, 8), bool)) & ~np.tril(np.ones((8, 8), bool), -2)
    np.testing.assert_array_equal(visited, band)
    wider = plans(causal(1, 64), config=BlockConfig(8, 8), window=10)
    assert np.asarray(visited_blocks(wider))[0].sum() == band.sum() + 6


def test_a_permuted_row_visits_what_it_would_in_order():
    """As context parallelism cuts a row: the first and the last eighth of it, and so on."""
    order = np.concatenate([np.arange(c * 8, c * 8 + 8) for c in (0, 7, 1, 6, 2, 5, 3, 4)])
    layout = packed([[20, 30, 10]], 64)
    plan = plans(layout, config=BlockConfig(8, 8))
    moved = TreeLayout(*(np.take(x, order, axis=1) for x in layout))
    permuted = plans(moved, config=BlockConfig(8, 8))
    at = order[::8] // 8
    wanted = np.asarray(visited_blocks(plan))[0][np.ix_(at, at)]
    np.testing.assert_array_equal(np.asarray(visited_blocks(permuted))[0], wanted)
    np.testing.assert_array_equal(full_blocks(permuted)[0], full_blocks(plan)[0][np.ix_(at, at)])


def test_siblings_are_passed_over_in_one_step_each():
    """A prompt of 64 and 16 answers of 64, in blocks of 8: the last answer's last block."""
    layout = prefix_tree([[(64, ROOT), *[(64, 0)] * 16]], 64 * 17)
    plan = plans(layout, config=BlockConfig(8, 8))
    found, steps = walk(plan, 0, 64 * 17 // 8 - 1)
    assert found == [*range(8), *range(8 * 16, 8 * 17)]
    assert steps == 8 + 15 + 8


@pytest.mark.parametrize("length", [1 << 20, 1 << 22])
def test_a_plan_of_millions_of_tokens_has_a_few_integers_a_block(length):
    layout = TreeLayout(*(jax.ShapeDtypeStruct((1, length), np.int32) for _ in range(3)))
    plan = jax.eval_shape(lambda x: make_plan(x, config=BlockConfig(1024, 1024)), layout)
    assert sum(x.size for x in jax.tree.leaves(plan)) == 16 * length // 1024
    compiled = jitted.lower(layout, config=BlockConfig(1024, 1024)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * length
