"""An order of tokens in which every device visits as many blocks: counted exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentx_kernels.balance import balanced_order, can_balance
from agentx_kernels.blocks import block_config
from agentx_kernels.hardware import hardware
from agentx_kernels.layout import ROOT, TreeLayout, causal, packed, prefix_tree
from agentx_kernels.plan import make_plan, visited_blocks

CPU = hardware("cpu")
PARTS, LENGTH = 8, 8192


@functools.partial(jax.jit, static_argnames="window")
def visits_of_parts(layout, window=None):
    """i32[B, P], the blocks that the queries of each part visit."""
    config = block_config(CPU, LENGTH // PARTS)
    visited_BIJ = visited_blocks(make_plan(layout, config=config, window=window))
    return visited_BIJ.reshape(len(layout.index), PARTS, -1).sum(2)


@functools.partial(jax.jit, static_argnames="window")
def ordered(layout, window=None):
    order = balanced_order(layout, PARTS, hardware=CPU, window=window)
    return order, TreeLayout(*(jnp.take_along_axis(x, order, 1) for x in layout))


def unevenness(layout, window=None):
    """The most that a part has to do over the least, in the worst of the rows."""
    visits_BP = np.asarray(visits_of_parts(layout, window))
    return (visits_BP.max(1) / visits_BP.min(1)).max()


def packings(rows):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(rows):
        lengths, left = [], LENGTH
        while left:
            lengths.append(min(left, 1 + int(rng.lognormal(6.5, 1.3))))
            left -= lengths[-1]
        found.append(lengths)
    return packed(found, LENGTH)


def trees(rows):
    """Prompts with eight rollouts each, until a row is full."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(rows):
        runs, left = [], LENGTH
        while left > 200:
            prompt = len(runs)
            for run in range(9):
                tokens = min(left, int(rng.integers(20, LENGTH // 10)))
                runs.append((tokens, ROOT if run == 0 else prompt))
                left -= tokens
        found.append([run for run in runs if run[0]])
    return prefix_tree(found, LENGTH)


def test_a_causal_row_is_dealt_in_zigzags():
    order, layout = ordered(causal(1, LENGTH))
    blocks = np.asarray(order).reshape(PARTS, -1, 128)[:, :, 0] // 128
    last = LENGTH // 128 - 1
    zigzag = [sorted([*range(p, last + 1, 16), *range(15 - p, last + 1, 16)]) for p in range(PARTS)]
    assert sorted(map(list, blocks)) == sorted(zigzag)
    assert unevenness(causal(1, LENGTH)) > 10
    assert unevenness(layout) <= 1.05


@pytest.mark.parametrize("rows", [packings, trees])
def test_packed_rows_and_trees_give_every_part_as_much(rows):
    before = rows(20)
    order, after = ordered(before)
    np.testing.assert_array_equal(
        np.sort(order, 1), np.broadcast_to(np.arange(LENGTH), (20, LENGTH))
    )
    assert unevenness(before) > 2
    assert unevenness(after) <= 1.15
    # Blocks move whole, so that not one more is visited.
    assert visits_of_parts(after).sum() == visits_of_parts(before).sum()


def test_a_window_gives_every_part_as_much():
    _, after = ordered(causal(1, LENGTH), 1000)
    assert unevenness(after, 1000) <= 1.15


def test_what_cannot_be_dealt_in_whole_blocks_is_refused():
    assert not can_balance(1024, 8, CPU)
    assert not can_balance(8000, 8, CPU)
    assert not can_balance(8192, 1, CPU)
    with pytest.raises(ValueError, match="not two whole blocks or more each"):
        balanced_order(causal(1, 1024), 8, hardware=CPU)
