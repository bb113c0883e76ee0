"""The keys and values of what each row has read so far, in arrays of fixed shape.

A row has its own length: columns beyond it are free, whatever they hold. Under jit with the cache
donated, or within a while_loop, `write` changes it in place.

Legend: L layers of a place, B rows, K KV heads, S columns, T new tokens, H head size, R rows of a
fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agentx.model.config import ModelConfig

Array = jax.Array


class KVCache(NamedTuple):
    """k, v: of each of `ModelConfig.places` [L, B, K, S, H], keys after rotation; or of each layer
    [B, K, S, H]. What they hold, and their K and H, is `ModelConfig.cache_dims`'s to say.

    lengths: i32[B], the columns that a row uses.
    """

    k: list[Array]
    v: list[Array]
    lengths: Array


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype: jnp.dtype | str | None = None
) -> KVCache:
    """An empty cache of `length` columns; `dtype` is the activations' by default."""
    dtype = config.compute_dtype if dtype is None else jnp.dtype(dtype)
    kv_heads, *sizes = config.cache_dims
    k, v = (
        [jnp.zeros((len(p.layers), batch, kv_heads, length, size), dtype) for p in config.places]
        for size in sizes
    )
    return KVCache(k, v, jnp.zeros(batch, jnp.int32))


def write(
    cache: KVCache, k_new: Sequence[Array], v_new: Sequence[Array], new_lengths: Array
) -> KVCache:
    """Appends to row b, at its own length, the first new_lengths[b] of T new tokens.

    k_new, v_new: [L, B, K, T, H] of each place, as `Transformer.decode` returns them. new_lengths:
    i32[B], from 0 to T. What does not fit into the row's columns is dropped, and does not count.
    """
    num_new, columns = k_new[0].shape[3], cache.k[0].shape[3]
    column_BT = new_columns(cache.lengths, new_lengths, num_new, columns)
    k, v = (
        [write_columns(old, new, column_BT) for old, new in zip(before, after, strict=True)]
        for before, after in ((cache.k, k_new), (cache.v, v_new))
    )
    return KVCache(k, v, jnp.minimum(cache.lengths + new_lengths, columns))


def new_columns(lengths: Array, new_lengths: Array, num_new: int, columns: int) -> Array:
    """For `write_columns`: where each row's new tokens go, i32[B, T]; lengths and counts i32[B].

    A token that is not to be written goes to a column that does not exist, one of its own.
    """
    steps_T = jnp.arange(num_new)
    written_BT = steps_T < new_lengths[:, None]
    return jnp.where(written_BT, lengths[:, None], columns) + steps_T


def write_columns(old: Array, new: Array, column_BT: Array) -> Array:
    """`old` with the T new columns in place of those that column_BT names; others are dropped.

    old: [L, B, K, S, H] or one layer of it, [B, K, S, H]. new: the same with T for S.
    """
    rows, columns = old.ndim - 4, old.ndim - 2
    # The rows are a batching dimension of the scatter, not indices of it: so XLA sees that rows
    # which are split over devices stay apart, and gathers nothing.
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, old.ndim)),
        inserted_window_dims=(columns,),
        scatter_dims_to_operand_dims=(columns,),
        operand_batching_dims=(rows,),
        scatter_indices_batching_dims=(0,),
    )
    new_BT = jnp.moveaxis(new, (rows, columns), (0, 1)).astype(old.dtype)
    return lax.scatter(
        old,
        column_BT[:, :, None],
        new_BT,
        numbers,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def fork(cache: KVCache, rows: Array) -> KVCache:
    """A cache of R rows, row r a copy of row rows[r]; rows i32[R]."""
    k, v = ([x[:, rows] for x in each] for each in (cache.k, cache.v))
    return KVCache(k, v, cache.lengths[rows])
