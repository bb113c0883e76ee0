"""Blockwise attention in plain XLA: linear memory forward and backward, on any platform.

The method is FlashAttention's (Dao et al., 2022; backward as in section 3.1 there): blocks of
queries against blocks of keys, a running maximum and sum, and a backward that recomputes the
probabilities from the saved log-sum-exp. No array of S x S exists; q, k, v, the output and the
log-sum-exp are all that is kept between forward and backward.

In order: the queries of one KV head are stacked into rows, so that a block is one matrix product
per KV head and keys are never repeated; the plan says, for each block of queries, which blocks of
keys some row of the batch may see; loops run over just those. A sequence that fits in one block
takes no loop at all.

Left out: a walk per row of the batch. XLA runs the rows of a batch in step, so a block is skipped
where no row needs it. Masks are computed in every visited block, full ones too: beside the matrix
products they cost nothing measurable.

Legend: B batch, S tokens, N heads, K KV heads, G = N / K heads that share a KV head, H head size,
Q queries and C keys (columns) of one block, R = G * Q rows of one block, I and J blocks of queries
and of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.layout import TreeLayout
from agentx_kernels.plan import BEYOND, BlockPlan, visits
from agentx_kernels.scores import Scores

Array = jax.Array


class _Blocks(NamedTuple):
    """One sequence, cut into blocks and laid out for matrix products."""

    q_IBKRH: Array
    k_JBKCH: Array
    v_JBKCH: Array
    index_IBQ: Array
    depth_IBQ: Array
    index_JBC: Array
    depth_JBC: Array
    end_JBC: Array


def forward(
    q_BSNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
    sinks_N: Array | None,
    scores: Scores,
) -> tuple[Array, Array]:
    """The output and its log-sum-exp [B, S, N]: minus infinity where nothing is seen.

    layouts: of the queries and of the keys.
    """
    blocks = _cut(q_BSNH, k_BSKH, v_BSKH, layouts, plan)
    num_q, num_k = blocks.q_IBKRH.shape[0], blocks.k_JBKCH.shape[0]
    acc_dtype = accumulation_dtype(q_BSNH)
    rows = blocks.q_IBKRH.shape[1:4]
    sinks_BKR = jnp.full((1, 1, 1), -jnp.inf, acc_dtype)
    if sinks_N is not None:
        sinks_BKR = _over_rows(sinks_N, rows, acc_dtype)
    if num_q == num_k == 1:
        m, total, o = _visit_forward(blocks, 0, 0, scores)
        o, lse = _normalise(m, total, o, sinks_BKR)
        o_IBKRH, lse_IBKR = o[None], lse[None]
    else:

        def attend(_, i):
            order_J, count = _to_visit(plan, i)

            def visit(step, carry):
                m_BKR, sum_BKR, o_BKRH = carry
                m, total, o = _visit_forward(blocks, i, order_J[step], scores)
                m_new = jnp.maximum(m_BKR, m)
                keep = jnp.exp(m_BKR - _finite(m_new))
                add = jnp.exp(m - _finite(m_new))
                return (
                    m_new,
                    sum_BKR * keep + total * add,
                    o_BKRH * keep[..., None] + o * add[..., None],
                )

            nothing = (
                jnp.full(rows, -jnp.inf, acc_dtype),
                jnp.zeros(rows, acc_dtype),
                jnp.zeros((*rows, v_BSKH.shape[3]), acc_dtype),
            )
            m, total, o = lax.fori_loop(0, count, visit, nothing)
            return None, _normalise(m, total, o, sinks_BKR)

        _, (o_IBKRH, lse_IBKR) = lax.scan(attend, None, jnp.arange(num_q))
    length, heads = q_BSNH.shape[1:3]
    lse_BSN = _join_rows(lse_IBKR[..., None], length, heads)[..., 0]
    return _join_rows(o_IBKRH.astype(v_BSKH.dtype), length, heads), lse_BSN


def backward(
    q_BSNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
    scores: Scores,
    do_BSNH: Array,
    lse_BSN: Array,
    delta_BSN: Array,
    dtype: Any = None,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, as `Path.backward` has them."""
    blocks = _cut(q_BSNH, k_BSKH, v_BSKH, layouts, plan)
    num_q, num_k = blocks.q_IBKRH.shape[0], blocks.k_JBKCH.shape[0]
    acc_dtype = accumulation_dtype(q_BSNH)
    kv_heads = k_BSKH.shape[2]

    def cut(x_BSNH: Array) -> Array:
        return _cut_rows(x_BSNH, kv_heads, plan.config.query)

    do_IBKRH = cut(do_BSNH)
    lse_IBKR, delta_IBKR = (cut(x[..., None])[..., 0] for x in (lse_BSN, delta_BSN))

    def visit_backward(i, j):
        return _visit_backward(blocks, i, j, scores, do_IBKRH[i], lse_IBKR[i], delta_IBKR[i])

    if num_q == num_k == 1:
        dq_IBKRH, dk_JBKHC, dv_JBKHC = (x[None] for x in visit_backward(0, 0))
    else:

        def attend(carry, i):
            order_J, count = _to_visit(plan, i)

            def visit(step, carry):
                dq_BKRH, dk_JBKHC, dv_JBKHC = carry
                j = order_J[step]
                dq, dk, dv = visit_backward(i, j)
                return dq_BKRH + dq, dk_JBKHC.at[j].add(dk), dv_JBKHC.at[j].add(dv)

            dq_BKRH = jnp.zeros(blocks.q_IBKRH.shape[1:], acc_dtype)
            dq_BKRH, *carry = lax.fori_loop(0, count, visit, (dq_BKRH, *carry))
            return tuple(carry), dq_BKRH

        dk_JBKHC = jnp.zeros(blocks.k_JBKCH.swapaxes(-1, -2).shape, acc_dtype)
        dv_JBKHC = jnp.zeros(blocks.v_JBKCH.swapaxes(-1, -2).shape, acc_dtype)
        (dk_JBKHC, dv_JBKHC), dq_IBKRH = lax.scan(attend, (dk_JBKHC, dv_JBKHC), jnp.arange(num_q))

    num_queries, num_keys = q_BSNH.shape[1], k_BSKH.shape[1]
    return (
        _join_rows(dq_IBKRH, num_queries, q_BSNH.shape[2]).astype(dtype or q_BSNH.dtype),
        _join_columns(dk_JBKHC, num_keys).astype(dtype or k_BSKH.dtype),
        _join_columns(dv_JBKHC, num_keys).astype(dtype or v_BSKH.dtype),
    )


def _visit_forward(blocks: _Blocks, i, j, scores: Scores) -> tuple[Array, Array, Array]:
    """Block i of queries sees block j of keys: the rows' maxima, sums and unnormalised outputs."""
    s_BKRC, _ = _scores(blocks, i, j, scores)
    m_BKR = s_BKRC.max(-1)
    p_BKRC = jnp.exp(s_BKRC - _finite(m_BKR)[..., None])
    o_BKRH = _matmul("bkrc,bkch->bkrh", p_BKRC.astype(blocks.v_JBKCH.dtype), blocks.v_JBKCH[j])
    return m_BKR, p_BKRC.sum(-1), o_BKRH


def _visit_backward(
    blocks: _Blocks, i, j, scores: Scores, do_BKRH: Array, lse_BKR: Array, delta_BKR: Array
) -> tuple[Array, Array, Array]:
    """What block i of queries and block j of keys add to dq of i, and to dk and dv of j.

    dk and dv come out with the head size before the columns: as `[H, R] @ [R, C]` the CPU's matrix
    product is twice as fast as with the large operand transposed.
    """
    dtype = do_BKRH.dtype
    s_BKRC, slope_BKRC = _scores(blocks, i, j, scores)
    p_BKRC = jnp.exp(s_BKRC - _finite(lse_BKR)[..., None])
    dp_BKRC = _matmul("bkrh,bkch->bkrc", do_BKRH, blocks.v_JBKCH[j])
    ds_BKRC = (p_BKRC * (dp_BKRC - delta_BKR[..., None]) * slope_BKRC).astype(dtype)
    dq_BKRH = _matmul("bkrc,bkch->bkrh", ds_BKRC, blocks.k_JBKCH[j])
    dk_BKHC = _matmul("bkhr,bkrc->bkhc", blocks.q_IBKRH[i].swapaxes(-1, -2), ds_BKRC)
    dv_BKHC = _matmul("bkhr,bkrc->bkhc", do_BKRH.swapaxes(-1, -2), p_BKRC.astype(dtype))
    return dq_BKRH, dk_BKHC, dv_BKHC


def _scores(blocks: _Blocks, i, j, scores: Scores) -> tuple[Array, Array | float]:
    """[B, K, R, C], minus infinity where a query may not see a key; and d score / d dot product."""
    s_BKRC = _matmul("bkrh,bkch->bkrc", blocks.q_IBKRH[i], blocks.k_JBKCH[j]) * scores.scale
    slope_BKRC: Array | float = scores.scale
    if scores.softcap is not None:
        tanh_BKRC = jnp.tanh(s_BKRC / scores.softcap)
        s_BKRC = scores.softcap * tanh_BKRC
        slope_BKRC = scores.scale * (1 - tanh_BKRC**2)
    batch, kv_heads, _, columns = s_BKRC.shape
    index_BQ1 = blocks.index_IBQ[i][:, :, None]
    allow_BQC = (blocks.index_JBC[j][:, None, :] <= index_BQ1) & (
        index_BQ1 < blocks.end_JBC[j][:, None, :]
    )
    if scores.window is not None:
        height_BQC = blocks.depth_IBQ[i][:, :, None] - blocks.depth_JBC[j][:, None, :]
        allow_BQC &= height_BQC < scores.window
    s_BKGQC = s_BKRC.reshape(batch, kv_heads, -1, index_BQ1.shape[1], columns)
    masked = jnp.where(allow_BQC[:, None, None], s_BKGQC, -jnp.inf).reshape(s_BKRC.shape)
    return masked, slope_BKRC


def _normalise(
    m_BKR: Array, sum_BKR: Array, o_BKRH: Array, sinks_BKR: Array
) -> tuple[Array, Array]:
    """The output and its log-sum-exp; 0 and minus infinity for a row that saw nothing."""
    top_BKR = _finite(jnp.maximum(m_BKR, sinks_BKR))
    keep_BKR = jnp.exp(m_BKR - top_BKR)
    sum_BKR = sum_BKR * keep_BKR + jnp.exp(sinks_BKR - top_BKR)
    some_BKR = jnp.where(sum_BKR > 0, sum_BKR, 1)
    lse_BKR = jnp.where(sum_BKR > 0, top_BKR + jnp.log(some_BKR), -jnp.inf)
    return o_BKRH * (keep_BKR / some_BKR)[..., None], lse_BKR


def _finite(x: Array) -> Array:
    """0 in place of minus infinity: what a row that sees nothing may subtract without a NaN."""
    return jnp.where(x == -jnp.inf, 0, x)


def _over_rows(x_N: Array, rows: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """What belongs to a head, for each row of a block: [N] -> [1, K, R]."""
    _, kv_heads, num_rows = rows
    x_KG = x_N.astype(dtype).reshape(kv_heads, -1)
    return jnp.repeat(x_KG, num_rows // x_KG.shape[1], axis=1)[None]


def _to_visit(plan: BlockPlan, i) -> tuple[Array, Array]:
    """The blocks of keys that block i of some row visits: the first `count` of an order."""
    query = jax.tree.map(lambda x: x[:, i, None], plan.queries)
    visited_J = visits(query, plan.keys, plan.window).any(0)
    return jnp.argsort(~visited_J, stable=True), visited_J.sum()


def _cut(
    q_BSNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    layouts: tuple[TreeLayout, TreeLayout],
    plan: BlockPlan,
) -> _Blocks:
    def cut_layout(x_BS: Array, block: int, filling: int) -> Array:
        batch, length = x_BS.shape
        x_BS = jnp.pad(x_BS, ((0, 0), (0, -length % block)), constant_values=filling)
        return x_BS.reshape(batch, -1, block).swapaxes(0, 1)

    kv_heads = k_BSKH.shape[2]
    queries, keys = layouts
    # What fills up the last block has an index above any subtree's end: it sees nothing.
    return _Blocks(
        _cut_rows(q_BSNH, kv_heads, plan.config.query),
        _cut_rows(k_BSKH, kv_heads, plan.config.key),
        _cut_rows(v_BSKH, kv_heads, plan.config.key),
        cut_layout(queries.index, plan.config.query, BEYOND),
        cut_layout(queries.position, plan.config.query, 0),
        cut_layout(keys.index, plan.config.key, BEYOND),
        cut_layout(keys.position, plan.config.key, 0),
        cut_layout(keys.subtree_end, plan.config.key, 0),
    )


def _cut_rows(x_BSNH: Array, kv_heads: int, block: int) -> Array:
    """[B, S, K * G, H] -> [I, B, K, G * Q, H], with zeros where the last block is not full."""
    batch, length, _, size = x_BSNH.shape
    x_BSNH = jnp.pad(x_BSNH, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x_BIQKGH = x_BSNH.reshape(batch, -1, block, kv_heads, x_BSNH.shape[2] // kv_heads, size)
    x_IBKGQH = x_BIQKGH.transpose(1, 0, 3, 4, 2, 5)
    return x_IBKGQH.reshape(*x_IBKGQH.shape[:3], -1, size)


def _join_rows(x_IBKRH: Array, length: int, heads: int) -> Array:
    num_blocks, batch, kv_heads, rows, size = x_IBKRH.shape
    groups = heads // kv_heads
    x_IBKGQH = x_IBKRH.reshape(num_blocks, batch, kv_heads, groups, rows // groups, size)
    return x_IBKGQH.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, size)[:, :length]


def _join_columns(x_JBKHC: Array, length: int) -> Array:
    _, batch, kv_heads, size, _ = x_JBKHC.shape
    x_BSKH = x_JBKHC.transpose(1, 0, 4, 2, 3).reshape(batch, -1, kv_heads, size)
    return x_BSKH[:, :length]


def _matmul(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x))


def accumulation_dtype(x: Array) -> jnp.dtype:
    """f32, or f64 for f64: what scores, sums and gradients are summed in."""
    return jnp.promote_types(x.dtype, jnp.float32)
