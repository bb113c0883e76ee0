"""Flash attention on TPU, forward, over a plan. Pallas, compiled by Mosaic.

The method is FlashAttention's (Dao et al., 2022), the softmax in base 2. A grid step takes a block
of queries and walks the blocks of keys that the plan has it visit, which are fetched from HBM one
ahead of the one at work; the first block of the next step is fetched during the last one of this.
The plan is prefetched to scalar memory, so no block is fetched in vain.

Scores stand as [queries, keys], a row's maximum and sum replicated over 128 lanes.

Legend: B batch, N heads, K KV heads, S tokens, H head size of q and k, Hv of v.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from agentx_kernels.plan import BlockPlan, KeyBlocks, QueryBlocks, is_full, visits
from agentx_kernels.tpu.masked_scores import (
    HIDDEN,
    LANES,
    LOG2_E,
    LOWEST,
    Options,
    allowed,
    at_block,
    capped,
    dot,
    over_lanes,
)

Array = Any


def forward(
    q: Array,
    k: Array,
    v: Array,
    query_tokens: Array,
    key_tokens: Array,
    plan: BlockPlan,
    sinks: Array,
    options: Options,
    after: Array | None,
) -> tuple[Array, Array]:
    """The output [B, N, S, Hv] and its log-sum-exp f32[B, N, S], in base 2; LOWEST if none is seen.

    q: [B, N, S, H]; k: [B, K, S, H]; v: [B, K, S, Hv]; lengths in whole blocks.
    query_tokens: i32[B, 2, S], index and depth. key_tokens: i32[B, 3, S], and subtree end.
    sinks: f32[N], -inf where there is none.
    after: any array or None; it is not read, but the kernel starts when it is there.
    """
    batch, heads, length, size = q.shape
    value_size = v.shape[3]
    block_q, block_k = plan.config.query, plan.config.key
    # Left to itself the compiler moves short rows to VMEM, where a copy takes loads and stores.
    whole = pl.BlockSpec(memory_space=pltpu.HBM)

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, block_q, width), lambda b, n, i, *_: (b, n, i, 0))

    scalars = [*plan.queries, *plan.keys, sinks]
    unread = [] if after is None else [after]
    kernel = functools.partial(
        _forward_kernel,
        groups=heads // k.shape[1],
        num_unread=len(unread),
        options=options,
    )
    o, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, length // block_q),
            in_specs=[
                rows(size),
                pl.BlockSpec((1, 2, block_q), lambda b, n, i, *_: (b, 0, i)),
                whole,
                whole,
                whole,
                *[whole] * len(unread),
            ],
            out_specs=[
                rows(value_size),
                pl.BlockSpec((1, 1, 1, block_q), lambda b, n, i, *_: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, block_k, size), k.dtype),
                pltpu.VMEM((2, block_k, value_size), v.dtype),
                pltpu.VMEM((2, 3, block_k), jnp.int32),
                pltpu.SemaphoreType.DMA((3, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((_num_fields(options.scores.window), block_q, LANES), jnp.int32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, value_size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, value_size), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        name="attention_forward",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=options.vmem_limit,
        ),
        interpret=options.interpret,
    )(*scalars, q, query_tokens, key_tokens, k, v, *unread)
    return o, lse[:, :, 0]


def _forward_kernel(*refs: Any, groups: int, num_unread: int, options: Options) -> None:
    window, part = options.scores.window, options.part
    num_q, num_k = len(QueryBlocks._fields), len(KeyBlocks._fields)
    queries, keys = QueryBlocks(*refs[:num_q]), KeyBlocks(*refs[num_q : num_q + num_k])
    sinks, q_ref, own_ref, tokens_hbm, k_hbm, v_hbm = refs[num_q + num_k :][:6]
    o_ref, lse_ref, *scratch = refs[num_q + num_k + 6 + num_unread :]
    k_buffer, v_buffer, t_buffer, arrived, slot_ref, own, m_ref, l_ref, acc_ref = scratch
    b, n, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_head = lax.div(n, groups)
    block_k = k_buffer.shape[1]
    query = at_block(queries, b, i)

    def copies(j: Array, slot: Array) -> list[Any]:
        at = pl.ds(j * block_k, block_k)
        parts = [
            (k_hbm.at[b, kv_head, at], k_buffer),
            (v_hbm.at[b, kv_head, at], v_buffer),
            (tokens_hbm.at[b, :, at], t_buffer),
        ]
        return [
            pltpu.make_async_copy(source, buffer.at[slot], arrived.at[place, slot])
            for place, (source, buffer) in enumerate(parts)
        ]

    def fetch(j: Array, slot: Array) -> None:
        for copy in copies(j, slot):
            copy.start()

    # The block of keys that the next step begins with is fetched during this one.
    after = jnp.minimum(i + 1, pl.num_programs(2) - 1)
    first_after = queries.first[b, after]
    is_seen_after = (after > i) & (first_after <= queries.last[b, after])

    @pl.when(i == 0)
    def _() -> None:
        slot_ref[0] = 0

    @pl.when((i == 0) & (query.first <= query.last))
    def _() -> None:
        fetch(query.first, 0)

    # Index and depth of the queries down the rows of a block, as the masks want them.
    for field in range(_num_fields(window)):
        row = own_ref[0, field : field + 1]
        own[field] = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    sink = sinks[n]
    m_ref[...] = jnp.full_like(m_ref, jnp.maximum(sink * LOG2_E, LOWEST))
    l_ref[...] = jnp.full_like(l_ref, jnp.where(sink == -jnp.inf, 0.0, 1.0))
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        j, slot = state
        following = _next_visited(j + 1, query, keys, b, window)
        is_over = following > query.last

        @pl.when(jnp.logical_not(is_over) | is_seen_after)
        def _() -> None:
            fetch(jnp.where(is_over, first_after, following), 1 - slot)

        for copy in copies(j, slot):
            copy.wait()
        key = at_block(keys, b, j)
        is_whole = is_full(query, key, window)

        def attend(masked: bool) -> None:
            for start in range(0, block_k, part):
                at = pl.ds(start, part)
                s = dot(q_ref[0, 0], k_buffer[slot, at], 1, 1) * (options.scores.scale * LOG2_E)
                s = capped(s, options.scores.softcap)
                if masked:
                    mine = [over_lanes(own[field], part) for field in range(own.shape[0])]
                    theirs = [t_buffer[slot, field : field + 1, at] for field in range(3)]
                    s = jnp.where(allowed(mine, theirs, window), s, HIDDEN)
                m = jnp.maximum(m_ref[...], s.max(1, keepdims=True))
                p = jnp.exp2(s - over_lanes(m, part))
                keep = jnp.exp2(m_ref[...] - m)
                m_ref[...] = m
                l_ref[...] = keep * l_ref[...] + p.sum(1, keepdims=True)
                v = v_buffer[slot, at]
                keep = over_lanes(keep, v.shape[1])
                acc_ref[...] = keep * acc_ref[...] + dot(p.astype(v.dtype), v, 1, 0)

        pl.when(is_whole)(lambda: attend(masked=False))
        pl.when(jnp.logical_not(is_whole))(lambda: attend(masked=True))
        return following, 1 - slot

    start = query.first, slot_ref[0]
    _, slot = lax.while_loop(lambda state: state[0] <= query.last, visit, start)
    slot_ref[0] = slot

    @pl.when((query.first > query.last) & is_seen_after)
    def _() -> None:
        fetch(first_after, slot)

    total = l_ref[...]
    some = jnp.where(total > 0, total, 1.0)
    o = acc_ref[...] / over_lanes(some, acc_ref.shape[1])
    o_ref[0, 0] = o.astype(o_ref.dtype)
    lse_ref[0, 0] = (m_ref[...] + jnp.log2(some)).T[:1]


def _next_visited(
    j: Array, query: QueryBlocks, keys: KeyBlocks, b: Array, window: int | None
) -> Array:
    """The first block from j on that the query's block visits; beyond its last if there is none."""

    def is_passed(j: Array) -> Array:
        key = at_block(keys, b, jnp.minimum(j, query.last))
        return (j <= query.last) & jnp.logical_not(visits(query, key, window))

    def step(j: Array) -> Array:
        is_under = keys.end_max[b, j] <= query.index_min
        return jnp.where(is_under, keys.skip[b, j], j + 1)

    return lax.while_loop(is_passed, step, j)


def _num_fields(window: int | None) -> int:
    """What of a query's token a mask asks for: its index, and with a window its depth."""
    return 1 if window is None else 2
