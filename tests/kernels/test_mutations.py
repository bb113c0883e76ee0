"""Every comparison of the masks and of the plan matters: with any of them flipped, a check fails.

A mutant is a module whose source has one comparison moved by one (`<` for `<=` and so on, `!=` for
`==`). The checks compare with the mask as the docstring of `layout` defines it.
"""

import ast
import inspect
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from agentx_kernels import layout as layout_module
from agentx_kernels import plan as plan_module
from agentx_kernels import xla
from agentx_kernels.blocks import BlockConfig
from agentx_kernels.layout import ROOT, causal, packed, prefix_tree
from agentx_kernels.scores import Scores
from agentx_kernels.tpu import flash_backward, flash_forward, masked_scores

LENGTH = 24
ROWS = [
    prefix_tree([[(5, ROOT), (4, 0), (3, 1), (6, 0), (4, ROOT)]], LENGTH),
    packed([[1, 3, 4, 8]], LENGTH),
    causal(1, LENGTH),
    packed([[1] * 7], LENGTH),
]
BLOCKS = [(1, 1), (4, 4), (5, 5), (8, 4), (32, 32)]
FLIPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


def comparisons(tree, functions):
    """The comparisons of numbers in these functions (all of the module's if None)."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and (not functions or function.name in functions):
            for node in ast.walk(function):
                if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
                    yield node


def places(module, functions):
    """Where the comparisons stand, (line, column), and how they read."""
    source = inspect.getsource(module)
    nodes = comparisons(ast.parse(source), functions)
    return {(n.lineno, n.col_offset): ast.get_source_segment(source, n) for n in nodes}


def mutant(module, place):
    """The module with the comparison at `place` flipped; with none if that is None."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and (node.lineno, node.col_offset) == place:
            node.ops = [FLIPPED[type(op)]() for op in node.ops]
    made = types.ModuleType("mutant")
    sys.modules["mutant"] = made  # where dataclasses look for what annotations name
    exec(compile(tree, module.__name__, "exec"), made.__dict__)
    return made


def seen(layout, window=None):
    """bool[S, S]"""
    index, end, depth = (np.asarray(x)[0] for x in layout)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    visible &= (end > 0)[:, None]
    if window is not None:
        visible &= depth[:, None] - depth[None, :] < window
    return visible


def in_blocks(mask, config):
    """bool[I, J, Q, C]; what fills up the last blocks sees nothing."""
    mask = np.pad(mask, [(0, -LENGTH % config.query), (0, -LENGTH % config.key)])
    rows, columns = mask.shape[0] // config.query, mask.shape[1] // config.key
    return mask.reshape(rows, config.query, columns, config.key).swapaxes(1, 2)


def check_layout(module):
    for layout in ROWS:
        np.testing.assert_array_equal(np.asarray(module.allow(layout))[0], seen(layout))
    forks = module.prefix_tree([[(2, ROOT), (3, 0), (0, 1), (2, 0)], []], 8)
    assert forks.subtree_end.tolist() == [[7, 7, 5, 5, 5, 7, 7, 0], [0] * 8]


def check_plan(module):
    for layout in ROWS:
        for blocks in BLOCKS:
            config = BlockConfig(*blocks)
            plan = module.make_plan(layout, config=config)
            pairs = in_blocks(seen(layout), config)
            visited = np.asarray(module.visited_blocks(plan))[0]
            if config.query == config.key:
                np.testing.assert_array_equal(visited, pairs.any((-1, -2)))
            np.testing.assert_array_equal(
                np.asarray(module.visits_of_queries(plan))[0], visited.sum(1)
            )
            np.testing.assert_array_equal(full(module, plan), pairs.all((-1, -2)))
            ends = np.asarray(plan.keys.end_max)[0]
            later = [np.flatnonzero(ends[j + 1 :] > ends[j]) for j in range(len(ends))]
            skip = [j + 1 + x[0] if len(x) else len(ends) for j, x in enumerate(later)]
            assert np.asarray(plan.keys.skip)[0].tolist() == skip
    for window in (1, 4, 5, 7, 8):
        config = BlockConfig(4, 4)
        plan = module.make_plan(causal(1, LENGTH), config=config, window=window)
        pairs = in_blocks(seen(causal(1, LENGTH), window), config)
        visited = np.asarray(module.visited_blocks(plan))[0]
        np.testing.assert_array_equal(visited, pairs.any((-1, -2)))
        np.testing.assert_array_equal(full(module, plan), pairs.all((-1, -2)))


def full(module, plan):
    queries = type(plan.queries)(*(x[0][:, None] for x in plan.queries))
    keys = type(plan.keys)(*(x[0][None, :] for x in plan.keys))
    return np.asarray(module.is_full(queries, keys, plan.window))


def check_tpu_mask(module):
    for layout in ROWS:
        for window in (None, 1, 4):
            index, end, depth = (np.asarray(x)[0] for x in layout)
            query = [x[:, None] for x in (index, depth)]
            key = [x[None, :] for x in (index, depth, end)]
            np.testing.assert_array_equal(
                module.allowed(query, key, window) & (end > 0)[:, None], seen(layout, window)
            )


def check_forward_walk(module):
    for plan, visited in walks():
        for i, wanted in enumerate(visited):
            query = masked_scores.at_block(plan.queries, 0, i)
            for j in range(int(query.first), int(query.last) + 2):
                found = module._next_visited(jnp.int32(j), query, plan.keys, 0, plan.window)
                assert_next(found, wanted, j, int(query.last))


def check_backward_walk(module):
    for plan, visited in walks():
        for j, wanted in enumerate(visited.T):
            key = masked_scores.at_block(plan.keys, 0, j)
            for i in range(int(key.first), int(key.last) + 2):
                found = module._next_visitor(jnp.int32(i), key, plan.queries, 0, plan.window)
                assert_next(found, wanted, i, int(key.last))


def walks():
    for layout, window in [(ROWS[0], None), (ROWS[1], 3)]:
        plan = plan_module.make_plan(layout, config=BlockConfig(4, 4), window=window)
        yield plan, np.asarray(plan_module.visited_blocks(plan))[0]


def assert_next(found, wanted, start, last):
    later = [x for x in np.flatnonzero(wanted) if x >= start]
    assert int(found) == later[0] if later else int(found) > last


def check_xla_mask(module):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, LENGTH, 1, 4), np.float32)) for _ in range(3))
    for layout, window in [(ROWS[0], None), (ROWS[0], 4), (ROWS[1], None)]:
        plan = plan_module.make_plan(layout, config=BlockConfig(8, 8), window=window)
        o, _ = module.forward(q, k, v, (layout, layout), plan, None, Scores(1.0, None, window))
        visible = seen(layout, window)
        p = np.exp(np.asarray(q[0, :, 0] @ k[0, :, 0].T)) * visible
        want = p @ np.asarray(v[0, :, 0]) / np.maximum(p.sum(1, keepdims=True), 1e-9)
        np.testing.assert_allclose(np.asarray(o)[0, :, 0], want, atol=1e-5)


# Flipped, these change how far a walk goes and not where it arrives: the last block is always one
# that is visited, and past a subtree leads one step as well as many.
HARMLESS = {
    "j <= query.last",
    "keys.end_max[b, j] <= query.index_min",
    "i <= key.last",
}

CHECKED = {
    "layout": (layout_module, ("allow",), check_layout),
    "plan": (plan_module, None, check_plan),
    "mask on TPU": (masked_scores, ("allowed",), check_tpu_mask),
    "forward's walk on TPU": (flash_forward, ("_next_visited",), check_forward_walk),
    "backward's walk on TPU": (flash_backward, ("_next_visitor",), check_backward_walk),
    "mask in XLA": (xla, ("_scores", "_to_visit"), check_xla_mask),
}


@pytest.mark.parametrize("name", CHECKED)
def test_a_check_fails_with_any_comparison_flipped(name):
    module, functions, check = CHECKED[name]
    check(mutant(module, None))
    flips = places(module, functions)
    assert flips
    survivors = set()
    for place, text in flips.items():
        try:
            check(mutant(module, place))
        except Exception:  # a mutant may fail in any way, so long as it does
            continue
        survivors.add(text)
    assert survivors == HARMLESS & set(flips.values())
