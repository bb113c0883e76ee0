"""Flash attention on TPU, backward: dq, dk and dv in one pass over a plan. Pallas and Mosaic.

A grid step takes a block of keys and walks the blocks of queries, of every head that shares these
keys, that the plan has visit it, fetched from HBM one ahead. Scores are computed once and stand as
[keys, queries], so that what belongs to a query is a row, and dk and dv need no transposition. dq
is summed in HBM in f32, a block at a time, by one core in one order: the same bits every time.

Legend: B batch, N heads, K KV heads, G = N / K, S tokens, H head size of q and k, Hv of v.
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
    Options,
    allowed,
    at_block,
    capped,
    dot,
    over_lanes,
)

Array = Any


def backward(
    q: Array,
    k: Array,
    v: Array,
    query_tokens: Array,
    key_tokens: Array,
    plan: BlockPlan,
    do: Array,
    lse: Array,
    delta: Array,
    options: Options,
    dtype: Any,
    after: Array | None,
) -> tuple[Array, Array, Array]:
    """dq f32[B, N, S, H], dk [B, K, S, H] and dv [B, K, S, Hv], these two in dtype.

    q, k, v and tokens: as for `flash_forward.forward`. do: [B, N, S, Hv]. lse: f32[B, N, S], in
    base 2. delta: f32[B, N, S], the sum of do * o, less the cotangent of lse. dtype: those of k
    and v if None. after: any array or None; it is not read, but the kernel starts when it is there.
    """
    batch, heads, _, size = q.shape
    kv_heads, length, value_size = v.shape[1:]
    block_q, block_k = plan.config.query, plan.config.key
    # Left to itself the compiler moves short rows to VMEM, where a copy takes loads and stores.
    whole = pl.BlockSpec(memory_space=pltpu.HBM)

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, block_k, width), lambda b, n, j, *_: (b, n, j, 0))

    scalars = [*plan.queries, *plan.keys]
    own = pl.BlockSpec((1, 3, block_k), lambda b, n, j, *_: (b, 0, j))
    zeros = jnp.zeros(q.shape, jnp.float32)
    sums = jnp.stack([lse, delta], 2)
    inputs = [k, v, key_tokens, q, do, sums, query_tokens, zeros]
    unread = [] if after is None else [after]
    return pl.pallas_call(
        functools.partial(
            _backward_kernel,
            groups=heads // kv_heads,
            num_unread=len(unread),
            options=options,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads, length // block_k),
            in_specs=[rows(size), rows(value_size), own, *[whole] * (5 + len(unread))],
            out_specs=[whole, rows(size), rows(value_size)],
            scratch_shapes=[
                pltpu.VMEM((2, block_q, size), q.dtype),
                pltpu.VMEM((2, block_q, value_size), do.dtype),
                pltpu.VMEM((2, 2, block_q), jnp.float32),
                pltpu.VMEM((2, 2, block_q), jnp.int32),
                pltpu.VMEM((2, block_q, size), jnp.float32),
                pltpu.SemaphoreType.DMA((5, 2)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((3, block_k, LANES), jnp.int32),
                pltpu.VMEM((block_k, size), jnp.float32),
                pltpu.VMEM((block_k, value_size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(k.shape, dtype or k.dtype),
            jax.ShapeDtypeStruct(v.shape, dtype or v.dtype),
        ],
        input_output_aliases={len(scalars) + len(inputs) - 1: 0},
        name="attention_backward",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=options.vmem_limit,
        ),
        interpret=options.interpret,
    )(*scalars, *inputs, *unread)


def _backward_kernel(*refs: Any, groups: int, num_unread: int, options: Options) -> None:
    window, part = options.scores.window, options.part
    num_q, num_k = len(QueryBlocks._fields), len(KeyBlocks._fields)
    queries, keys = QueryBlocks(*refs[:num_q]), KeyBlocks(*refs[num_q : num_q + num_k])
    k_ref, v_ref, own_ref, q_hbm, do_hbm, sums_hbm, tokens_hbm = refs[num_q + num_k :][:7]
    dq_hbm, dk_ref, dv_ref, *scratch = refs[
        num_q + num_k + 8 + num_unread :
    ]  # behind the zeros that dq begins as
    q_buffer, do_buffer, sums_buffer, t_buffer, dq_buffer, arrived, stored, *scratch = scratch
    own, dk_acc, dv_acc = scratch
    b, kv_head, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block_q = q_buffer.shape[1]
    key = at_block(keys, b, j)

    def copies(g: Array, i: Array, slot: Array) -> list[Any]:
        n, at = kv_head * groups + g, pl.ds(i * block_q, block_q)
        parts = [
            (q_hbm.at[b, n, at], q_buffer),
            (do_hbm.at[b, n, at], do_buffer),
            (sums_hbm.at[b, n, :, at], sums_buffer),
            (tokens_hbm.at[b, :, at], t_buffer),
            (dq_hbm.at[b, n, at], dq_buffer),
        ]
        return [
            pltpu.make_async_copy(source, buffer.at[slot], arrived.at[place, slot])
            for place, (source, buffer) in enumerate(parts)
        ]

    def store(g: Array, i: Array, slot: Array) -> Any:
        n, at = kv_head * groups + g, pl.ds(i * block_q, block_q)
        return pltpu.make_async_copy(dq_buffer.at[slot], dq_hbm.at[b, n, at], stored.at[slot])

    for field in range(3):
        row = own_ref[0, field : field + 1]
        own[field] = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

    is_seen = key.first <= key.last

    @pl.when(is_seen)
    def _() -> None:
        for copy in copies(0, key.first, 0):
            copy.start()

    def visit(state: tuple[Array, ...]) -> tuple[Array, ...]:
        g, i, slot, num_before = state
        next_i = _next_visitor(i + 1, key, queries, b, window)
        is_over = next_i > key.last
        next_g, next_i = jnp.where(is_over, g + 1, g), jnp.where(is_over, key.first, next_i)

        # What the other slot holds of dq has to be stored before the slot is filled again.
        @pl.when(num_before > 0)
        def _() -> None:
            store(g, i, 1 - slot).wait()

        @pl.when(next_g < groups)
        def _() -> None:
            for copy in copies(next_g, next_i, 1 - slot):
                copy.start()

        for copy in copies(g, i, slot):
            copy.wait()
        is_whole = is_full(at_block(queries, b, i), key, window)

        def attend(masked: bool) -> None:
            k, v = k_ref[0, 0], v_ref[0, 0]
            for start in range(0, block_q, part):
                at = pl.ds(start, part)
                q, do = q_buffer[slot, at], do_buffer[slot, at]
                s = dot(k, q, 1, 1) * (options.scores.scale * LOG2_E)
                s = capped(s, options.scores.softcap)
                slope = (
                    1.0 - (s * (1 / (options.scores.softcap * LOG2_E))) ** 2
                    if options.scores.softcap
                    else None
                )
                if masked:
                    mine = [t_buffer[slot, field : field + 1, at] for field in range(2)]
                    theirs = [over_lanes(own[field], part) for field in range(3)]
                    s = jnp.where(allowed(mine, theirs, window), s, HIDDEN)
                p = jnp.exp2(s - sums_buffer[slot, 0:1, at])
                # Sums stand second: the compiler then adds a product up inside the matrix unit.
                dv_acc[...] = dot(p.astype(do.dtype), do, 1, 0) + dv_acc[...]
                ds = p * (dot(v, do, 1, 1) - sums_buffer[slot, 1:2, at])
                if slope is not None:
                    ds = ds * slope
                ds = ds.astype(q.dtype)
                dk_acc[...] = dot(ds, q, 1, 0) + dk_acc[...]
                dq_buffer[slot, at] = dot(ds, k, 0, 0) + dq_buffer[slot, at]

        pl.when(is_whole)(lambda: attend(masked=False))
        pl.when(jnp.logical_not(is_whole))(lambda: attend(masked=True))
        store(g, i, slot).start()
        return next_g, next_i, 1 - slot, num_before + 1

    first = jnp.where(is_seen, 0, groups), key.first, 0, 0
    slot = lax.while_loop(lambda state: state[0] < groups, visit, first)[2]

    @pl.when(is_seen)
    def _() -> None:
        store(0, key.first, 1 - slot).wait()

    dk_ref[0, 0] = (dk_acc[...] * options.scores.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


def _next_visitor(
    i: Array, key: KeyBlocks, queries: QueryBlocks, b: Array, window: int | None
) -> Array:
    """The first block of queries from i on that visits the keys; beyond their last if none does."""

    def is_passed(i: Array) -> Array:
        query = at_block(queries, b, jnp.minimum(i, key.last))
        return (i <= key.last) & jnp.logical_not(visits(query, key, window))

    return lax.while_loop(is_passed, lambda i: i + 1, i)
