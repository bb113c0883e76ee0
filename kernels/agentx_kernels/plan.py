"""Which blocks of keys a block of queries has to visit. Made once a batch, used by every layer.

A plan holds a few integers a block: the range of the indices, depths and subtree ends inside it.
From these, two blocks decide by a handful of comparisons whether any query of the one sees any key
of the other, and whether all do, in which case no mask is computed. Nothing here grows with the
square of the length, so a plan of 4 million tokens in blocks of 1,024 is 300 KB a row.

It is exact where blocks are runs of consecutive indices and there is no window: in depth-first
order a block before the queries' own holds a visible key exactly where some key's subtree ends
behind the first of the queries. With a window it may visit a block in vain where a block holds the
end of one document and the start of another.

    first..last of a block of queries bound the blocks of keys that it visits, and between them
    `skip` leads past whole subtrees: the next block whose subtrees end later. A query that a
    block's subtrees end before, no block until that one can be seen by either.

Everything is jnp and works under jit; `visits` and `is_full` also work on the scalars that a kernel
reads from a prefetched plan.

Legend: B rows, S tokens a row, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.blocks import BlockConfig
from agentx_kernels.layout import TreeLayout

# A jax.Array; inside a kernel, a reference to one.
Array = Any

# Above any index: where a block has no token that counts, and the index of what fills it up.
BEYOND = jnp.iinfo(jnp.int32).max

# Blocks that are compared with all others at once.
_AT_ONCE = 64


class QueryBlocks(NamedTuple):
    """Of the tokens of each block that are no padding, as queries; each i32[B, I].

    index_min, index_max: BEYOND and -1 where all are padding. whole: 1 where none is.
    depth_min, depth_max: the range of `TreeLayout.position`.
    first, last: the blocks of keys that it visits lie between these; last < first: it visits none.
    """

    index_min: Array
    index_max: Array
    whole: Array
    depth_min: Array
    depth_max: Array
    first: Array
    last: Array


class KeyBlocks(NamedTuple):
    """Of the tokens of each block that are no padding, as keys; each i32[B, J].

    end_min, end_max: the range of `TreeLayout.subtree_end`, in which padding counts as 0.
    skip: the next block whose end_max is greater, J if there is none.
    first, last: the blocks of queries that visit it lie between these.
    """

    index_min: Array
    index_max: Array
    depth_min: Array
    depth_max: Array
    end_min: Array
    end_max: Array
    skip: Array
    first: Array
    last: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["queries", "keys"],
    meta_fields=["lengths", "config", "window"],
)
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """See the module. lengths (of queries and of keys), config, window: what it was made for."""

    queries: QueryBlocks
    keys: KeyBlocks
    lengths: tuple[int, int]
    config: BlockConfig
    window: int | None


def make_plan(
    layout: TreeLayout,
    *,
    config: BlockConfig,
    window: int | None = None,
    keys: TreeLayout | None = None,
) -> BlockPlan:
    """The plan of a batch, for attention in these blocks and with this window.

    layout: i32[B, S] each. The last block may be shorter than the others.
    config: from `agentx_kernels.blocks`.
    window: a token sees itself and ancestors less than `window` above it; None for all of them.
    keys: the layout of the keys, where they are others of the same rows' tokens than the queries.
    """
    keys = layout if keys is None else keys
    index_q, end_q, depth_q = (_blocks(x, config.query) for x in layout)
    index_k, end_k, depth_k = (_blocks(x, config.key) for x in keys)
    real_q, real_k = end_q > 0, end_k > 0
    query_blocks = QueryBlocks(
        index_min=_least(index_q, real_q),
        index_max=_most(index_q, real_q),
        whole=real_q.all(-1).astype(jnp.int32),
        depth_min=_least(depth_q, real_q),
        depth_max=_most(depth_q, real_q),
        first=None,
        last=None,
    )
    end_max = end_k.max(-1)
    key_blocks = KeyBlocks(
        index_min=_least(index_k, real_k),
        index_max=_most(index_k, real_k),
        depth_min=_least(depth_k, real_k),
        depth_max=_most(depth_k, real_k),
        end_min=end_k.min(-1),
        end_max=end_max,
        skip=_next_greater(end_max),
        first=None,
        last=None,
    )
    query_blocks = query_blocks._replace(
        **_bounds(query_blocks, lambda query: visits(query, key_blocks, window))
    )
    key_blocks = key_blocks._replace(
        **_bounds(key_blocks, lambda key: visits(query_blocks, key, window))
    )
    lengths = layout.index.shape[1], keys.index.shape[1]
    return BlockPlan(query_blocks, key_blocks, lengths, config, window)


def visited_blocks(plan: BlockPlan) -> Array:
    """bool[B, I, J], which blocks are visited: for counting and tests, and inside a reduction."""
    queries = QueryBlocks(*(None if x is None else x[:, :, None] for x in plan.queries))
    keys = KeyBlocks(*(None if x is None else x[:, None, :] for x in plan.keys))
    return visits(queries, keys, plan.window)


def visits_of_queries(plan: BlockPlan) -> Array:
    """i32[B, I], how many blocks of keys each block of queries visits."""

    def count(query: QueryBlocks) -> Array:
        return visits(query, plan.keys, plan.window).sum(1, dtype=jnp.int32)

    return _over_blocks(plan.queries, count)


def visits(query: QueryBlocks, key: KeyBlocks, window: int | None) -> Array:
    """Whether some query of a block may see some key of another."""
    some = (key.index_min <= query.index_max) & (key.end_max > query.index_min)
    if window is not None:
        some &= query.depth_min - key.depth_max < window
    return some


def is_full(query: QueryBlocks, key: KeyBlocks, window: int | None) -> Array:
    """Whether every query of a block sees every key of another: no mask is needed."""
    every = (key.index_max <= query.index_min) & (key.end_min > query.index_max)
    every &= query.whole == 1
    if window is not None:
        every &= query.depth_max - key.depth_min < window
    return every


def _blocks(x_BS: Array, block: int) -> Array:
    """[B, S] -> [B, blocks, block]; what fills up the last one is padding."""
    batch, length = x_BS.shape
    return jnp.pad(x_BS, ((0, 0), (0, -length % block))).reshape(batch, -1, block)


def _least(x: Array, real: Array) -> Array:
    return jnp.where(real, x, BEYOND).min(-1)


def _most(x: Array, real: Array) -> Array:
    return jnp.where(real, x, -1).max(-1)


def _bounds(blocks: Any, visited: Callable[[Any], Array]) -> dict[str, Array]:
    """`first` and `last` of each block of one side, given which of the other one meets."""

    def bound(block: Any) -> tuple[Array, Array]:
        visited_BJ = visited(block)
        at = jnp.arange(visited_BJ.shape[1], dtype=jnp.int32)
        first = jnp.where(visited_BJ, at, at.size).min(1)
        return first, jnp.where(visited_BJ, at, -1).max(1)

    first, last = _over_blocks(blocks, bound)
    return {"first": first, "last": last}


def _over_blocks(blocks: Any, f: Callable[[Any], Any]) -> Any:
    """What f(block [B, 1] each) -> [B] gives for every block, [B, I].

    A few blocks at a time, for all with all would be an array that grows with the square.
    """
    names = [name for name, x in zip(blocks._fields, blocks, strict=True) if x is not None]

    def one(columns: list[Array]) -> Any:
        return f(blocks._replace(**{n: x[:, None] for n, x in zip(names, columns, strict=True)}))

    found = lax.map(one, [getattr(blocks, name).T for name in names], batch_size=_AT_ONCE)
    return jax.tree.map(lambda x: x.T, found)


def _next_greater(x_BJ: Array) -> Array:
    """For each of a row the place of the next that is greater, J if there is none.

    Each starts at its neighbour and follows what that one has found, until none moves.
    """
    num_blocks = x_BJ.shape[1]
    guarded = jnp.pad(x_BJ, ((0, 0), (0, 1)), constant_values=BEYOND)

    def is_short(next_BJ: Array) -> Array:
        return jnp.take_along_axis(guarded, next_BJ, axis=1) <= x_BJ

    def follow(next_BJ: Array) -> Array:
        beyond = jnp.pad(next_BJ, ((0, 0), (0, 1)), constant_values=num_blocks)
        return jnp.where(is_short(next_BJ), jnp.take_along_axis(beyond, next_BJ, axis=1), next_BJ)

    start = jnp.broadcast_to(jnp.arange(1, num_blocks + 1, dtype=jnp.int32), x_BJ.shape)
    return lax.while_loop(lambda next_BJ: is_short(next_BJ).any(), follow, start)
