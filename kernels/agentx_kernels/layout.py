"""Who sees whom, in three integers a token: causal rows, packed documents and prefix trees alike.

Tokens stand in depth-first order of a forest, and a token sees exactly its ancestors and itself:

    allow(q, k) = index[k] <= index[q] < subtree_end[k]

A causal row is one chain; packed documents are a forest of chains; a group of rollouts that shares
its prompt, or an episode that forks, is a tree. The metadata grows with S, never with S * S.

The builders of trees and packings run on the host, in numpy; `causal` also serves under jit. What a
layout leaves out: attention windows, which belong to a kernel and are counted in `position`.

Legend: B rows, S tokens a row, Q and K the same tokens as queries and as keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# A jax.Array, or a numpy array on the host.
Array = Any

ROOT = -1


class TreeLayout(NamedTuple):
    """The place of every token of a batch in its row's forest. Each i32[B, S].

    index: the token's number in depth-first order; its column, unless something has permuted the
      columns (as context parallelism does), in which case it is the column before that.
    subtree_end: one more than the index of the last token below it; 0 for padding, which nobody
      sees, itself included.
    position: the token's depth in its tree, which is what RoPE rotates by; 0 for padding.
    """

    index: Array
    subtree_end: Array
    position: Array


def causal(batch: int, length: int) -> TreeLayout:
    """`batch` rows of one document each, without padding. Works on the host and under jit."""
    index_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return TreeLayout(index_BS, jnp.full((batch, length), length, jnp.int32), index_BS)


def packed(lengths_per_row: Sequence[Sequence[int]], length: int) -> TreeLayout:
    """Rows of documents that do not see each other, each row padded to `length`. Numpy.

    packed([[2, 1]], 4):  index        0 1 2 3
                          subtree_end  2 2 3 0
                          position     0 1 0 0

    Raises ValueError where a row's documents exceed `length`.
    """
    rows = [[(tokens, ROOT) for tokens in lengths] for lengths in lengths_per_row]
    return prefix_tree(rows, length)


def prefix_tree(rows: Sequence[Sequence[tuple[int, int]]], length: int) -> TreeLayout:
    """Rows that hold a forest each, padded to `length`. Numpy.

    A row is a list of runs of tokens, in depth-first order, which is also the order of the tokens
    in the row. A run is `(number of tokens, parent)`; the parent is the place in that list of the
    run that it continues, or ROOT (-1).

    One prompt of 2 tokens and its two continuations, of 2 tokens and 1:
    prefix_tree([[(2, ROOT), (2, 0), (1, 0)]], 6):  index        0 1 2 3 4 5
                                                    subtree_end  5 5 4 4 5 0
                                                    position     0 1 2 3 2 0

    Raises ValueError where a row exceeds `length`, a run has a negative number of tokens, or a
    run's parent is not the run before it or one of that run's ancestors (not depth-first).
    """
    shape = (len(rows), length)
    index_BS = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    subtree_end_BS = np.zeros(shape, np.int32)
    position_BS = np.zeros(shape, np.int32)
    for row, runs in enumerate(rows):
        total = sum(tokens for tokens, _ in runs)
        if total > length:
            raise ValueError(
                f"row {row} holds {total} tokens, more than its length of {length}: "
                f"move runs to another row or make the rows longer"
            )
        starts = _starts(row, runs)
        ends = [start + tokens for start, (tokens, _) in zip(starts, runs, strict=True)]
        depths: list[int] = []
        for tokens, parent in runs:
            depths.append(tokens + (depths[parent] if parent != ROOT else 0))
        for run in reversed(range(len(runs))):
            tokens, parent = runs[run]
            own = slice(starts[run], starts[run] + tokens)
            subtree_end_BS[row, own] = ends[run]
            position_BS[row, own] = np.arange(depths[run] - tokens, depths[run])
            if parent != ROOT:
                ends[parent] = max(ends[parent], ends[run])
    return TreeLayout(index_BS, subtree_end_BS, position_BS)


def _starts(row: int, runs: Sequence[tuple[int, int]]) -> list[int]:
    """The column where each run begins, once the runs are known to be in depth-first order."""
    starts: list[int] = []
    path: list[int] = []
    column = 0
    for run, (tokens, parent) in enumerate(runs):
        if tokens < 0:
            raise ValueError(f"run {run} of row {row} has {tokens} tokens; give 0 or more")
        while path and path[-1] != parent:
            path.pop()
        if parent != ROOT and not path:
            raise ValueError(
                f"run {run} of row {row} continues run {parent}, which is not the run before it "
                f"or an ancestor of that one: give the runs in depth-first order"
            )
        path.append(run)
        starts.append(column)
        column += tokens
    return starts


def allow(layout: TreeLayout) -> Array:
    """bool[B, Q, K], whether query q sees key k. For the oracle and tests: this one is S * S."""
    index_BQ1 = layout.index[:, :, None]
    index_B1K = layout.index[:, None, :]
    return (index_B1K <= index_BQ1) & (index_BQ1 < layout.subtree_end[:, None, :])
