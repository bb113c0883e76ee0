"""Blockwise attention in plain XLA: linear memory forward and backward, on any platform.

The method is FlashAttention's (Dao et al., 2022; backward as in section 3.1 there): blocks of
queries against blocks of keys, a running maximum and sum, and a backward that recomputes the
probabilities from the saved log-sum-exp. No array of S x S exists; q, k, v, the output and the
log-sum-exp are all that is kept between forward and backward.

In order: the queries of one KV head are stacked into rows, so that a block is one matrix product
per KV head and keys are never repeated; a plan lists, for each block of queries, the blocks of keys
that some row of the batch may see; loops run over just those. A sequence that fits in one block
takes no loop at all.

Left out: a plan per row of the batch. XLA runs the rows of a batch in step, so a block is skipped
where no row needs it. Masks are computed in every visited block, full ones too: beside the matrix
products they cost nothing measurable.

Legend: B batch, S tokens, N heads, K KV heads, G = N / K heads that share a KV head, H head size,
Q queries and C keys (columns) of one block, R = G * Q rows of one block, I blocks of a sequence.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agentx_kernels.layout import TreeLayout

Array = jax.Array

# The index of the tokens that fill up the last block: above any subtree_end, so they see nothing.
_BEYOND = jnp.iinfo(jnp.int32).max


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention(
    q_BSNH: Array, k_BSKH: Array, v_BSKH: Array, layout: TreeLayout, scale: float, block_size: int
) -> Array:
    """What agentx_kernels.attention documents; it has checked the arguments."""
    o_BSNH, _ = _forward(q_BSNH, k_BSKH, v_BSKH, layout, scale, block_size)
    return o_BSNH


class _Blocks(NamedTuple):
    """One sequence, cut into blocks and laid out for matrix products."""

    q_IBKRH: Array
    k_IBKCH: Array
    v_IBKCH: Array
    index_IBQ: Array
    end_IBC: Array


class _Plan(NamedTuple):
    """For each block of queries, the blocks of keys to visit: the first `count_I` of `order_II`."""

    order_II: Array
    count_I: Array


def _forward(
    q_BSNH: Array, k_BSKH: Array, v_BSKH: Array, layout: TreeLayout, scale: float, block_size: int
) -> tuple[Array, tuple]:
    blocks = _cut(q_BSNH, k_BSKH, v_BSKH, layout, block_size)
    num_blocks = blocks.q_IBKRH.shape[0]
    acc_dtype = _accumulation_dtype(q_BSNH)
    if num_blocks == 1:
        o, lse = _normalise(*_visit_forward(blocks, 0, 0, scale))
        o_IBKRH, lse_IBKR = o[None], lse[None]
    else:
        plan = _make_plan(blocks)

        def attend(_, i):
            def visit(step, carry):
                m_BKR, sum_BKR, o_BKRH = carry
                m, total, o = _visit_forward(blocks, i, plan.order_II[i, step], scale)
                m_new = jnp.maximum(m_BKR, m)
                keep = jnp.exp(m_BKR - _finite(m_new))
                add = jnp.exp(m - _finite(m_new))
                return (
                    m_new,
                    sum_BKR * keep + total * add,
                    o_BKRH * keep[..., None] + o * add[..., None],
                )

            rows = blocks.q_IBKRH.shape[1:4]
            nothing = (
                jnp.full(rows, -jnp.inf, acc_dtype),
                jnp.zeros(rows, acc_dtype),
                jnp.zeros((*rows, v_BSKH.shape[3]), acc_dtype),
            )
            return None, _normalise(*lax.fori_loop(0, plan.count_I[i], visit, nothing))

        _, (o_IBKRH, lse_IBKR) = lax.scan(attend, None, jnp.arange(num_blocks))
    o_BSNH = _join_rows(o_IBKRH.astype(v_BSKH.dtype), q_BSNH.shape[1], q_BSNH.shape[2])
    return o_BSNH, (q_BSNH, k_BSKH, v_BSKH, layout, o_BSNH, lse_IBKR)


def _backward(scale: float, block_size: int, residuals: tuple, do_BSNH: Array) -> tuple:
    q_BSNH, k_BSKH, v_BSKH, layout, o_BSNH, lse_IBKR = residuals
    blocks = _cut(q_BSNH, k_BSKH, v_BSKH, layout, block_size)
    num_blocks = blocks.q_IBKRH.shape[0]
    acc_dtype = _accumulation_dtype(q_BSNH)
    kv_heads = k_BSKH.shape[2]
    do_IBKRH = _cut_rows(do_BSNH, kv_heads, block_size)
    delta_BSN = jnp.sum(do_BSNH.astype(acc_dtype) * o_BSNH.astype(acc_dtype), -1, keepdims=True)
    delta_IBKR = _cut_rows(delta_BSN, kv_heads, block_size)[..., 0]

    if num_blocks == 1:
        dq, dk, dv = _visit_backward(blocks, 0, 0, scale, do_IBKRH[0], lse_IBKR[0], delta_IBKR[0])
        dq_IBKRH, dk_IBKHC, dv_IBKHC = dq[None], dk[None], dv[None]
    else:
        plan = _make_plan(blocks)

        def attend(carry, i):
            def visit(step, carry):
                dq_BKRH, dk_IBKHC, dv_IBKHC = carry
                j = plan.order_II[i, step]
                dq, dk, dv = _visit_backward(
                    blocks, i, j, scale, do_IBKRH[i], lse_IBKR[i], delta_IBKR[i]
                )
                return dq_BKRH + dq, dk_IBKHC.at[j].add(dk), dv_IBKHC.at[j].add(dv)

            dq_BKRH = jnp.zeros(blocks.q_IBKRH.shape[1:], acc_dtype)
            dq_BKRH, *carry = lax.fori_loop(0, plan.count_I[i], visit, (dq_BKRH, *carry))
            return tuple(carry), dq_BKRH

        dk_IBKHC = jnp.zeros(blocks.k_IBKCH.swapaxes(-1, -2).shape, acc_dtype)
        dv_IBKHC = jnp.zeros(blocks.v_IBKCH.swapaxes(-1, -2).shape, acc_dtype)
        (dk_IBKHC, dv_IBKHC), dq_IBKRH = lax.scan(
            attend, (dk_IBKHC, dv_IBKHC), jnp.arange(num_blocks)
        )

    length = q_BSNH.shape[1]
    return (
        _join_rows(dq_IBKRH, length, q_BSNH.shape[2]).astype(q_BSNH.dtype),
        _join_columns(dk_IBKHC, length).astype(k_BSKH.dtype),
        _join_columns(dv_IBKHC, length).astype(v_BSKH.dtype),
        None,
    )


flash_attention.defvjp(_forward, _backward)


def _visit_forward(blocks: _Blocks, i, j, scale: float) -> tuple[Array, Array, Array]:
    """Block i of queries sees block j of keys: the rows' maxima, sums and unnormalised outputs."""
    s_BKRC = _scores(blocks, i, j, scale)
    m_BKR = s_BKRC.max(-1)
    p_BKRC = jnp.exp(s_BKRC - _finite(m_BKR)[..., None])
    o_BKRH = _matmul("bkrc,bkch->bkrh", p_BKRC.astype(blocks.v_IBKCH.dtype), blocks.v_IBKCH[j])
    return m_BKR, p_BKRC.sum(-1), o_BKRH


def _visit_backward(
    blocks: _Blocks, i, j, scale: float, do_BKRH: Array, lse_BKR: Array, delta_BKR: Array
) -> tuple[Array, Array, Array]:
    """What block i of queries and block j of keys add to dq of i, and to dk and dv of j.

    dk and dv come out with the head size before the columns: as `[H, R] @ [R, C]` the CPU's matrix
    product is twice as fast as with the large operand transposed.
    """
    dtype = do_BKRH.dtype
    p_BKRC = jnp.exp(_scores(blocks, i, j, scale) - _finite(lse_BKR)[..., None])
    dp_BKRC = _matmul("bkrh,bkch->bkrc", do_BKRH, blocks.v_IBKCH[j])
    ds_BKRC = (p_BKRC * (dp_BKRC - delta_BKR[..., None]) * scale).astype(dtype)
    dq_BKRH = _matmul("bkrc,bkch->bkrh", ds_BKRC, blocks.k_IBKCH[j])
    dk_BKHC = _matmul("bkhr,bkrc->bkhc", blocks.q_IBKRH[i].swapaxes(-1, -2), ds_BKRC)
    dv_BKHC = _matmul("bkhr,bkrc->bkhc", do_BKRH.swapaxes(-1, -2), p_BKRC.astype(dtype))
    return dq_BKRH, dk_BKHC, dv_BKHC


def _scores(blocks: _Blocks, i, j, scale: float) -> Array:
    """Scaled dot products [B, K, R, C], minus infinity where a query may not see a key."""
    s_BKRC = _matmul("bkrh,bkch->bkrc", blocks.q_IBKRH[i], blocks.k_IBKCH[j]) * scale
    batch, kv_heads, _, columns = s_BKRC.shape
    index_BQ1 = blocks.index_IBQ[i][:, :, None]
    allow_BQC = (blocks.index_IBQ[j][:, None, :] <= index_BQ1) & (
        index_BQ1 < blocks.end_IBC[j][:, None, :]
    )
    s_BKGQC = s_BKRC.reshape(batch, kv_heads, -1, index_BQ1.shape[1], columns)
    return jnp.where(allow_BQC[:, None, None], s_BKGQC, -jnp.inf).reshape(s_BKRC.shape)


def _normalise(m_BKR: Array, sum_BKR: Array, o_BKRH: Array) -> tuple[Array, Array]:
    """The output and its log-sum-exp; 0 and minus infinity for a row that saw nothing."""
    some_BKR = jnp.where(sum_BKR > 0, sum_BKR, 1)
    return o_BKRH / some_BKR[..., None], m_BKR + jnp.log(some_BKR)


def _finite(x: Array) -> Array:
    """0 in place of minus infinity: what a row that sees nothing may subtract without a NaN."""
    return jnp.where(x == -jnp.inf, 0, x)


def _make_plan(blocks: _Blocks) -> _Plan:
    lo_IB = blocks.index_IBQ.min(-1)
    hi_IB = blocks.index_IBQ.max(-1)
    end_IB = blocks.end_IBC.max(-1)
    visit_II = ((lo_IB[None] <= hi_IB[:, None]) & (end_IB[None] > lo_IB[:, None])).any(-1)
    order_II = jnp.argsort(~visit_II, axis=-1, stable=True).astype(jnp.int32)
    return _Plan(order_II, visit_II.sum(-1, dtype=jnp.int32))


def _cut(q_BSNH: Array, k_BSKH: Array, v_BSKH: Array, layout: TreeLayout, block: int) -> _Blocks:
    def cut_layout(x_BS: Array, filling: int) -> Array:
        batch, length = x_BS.shape
        x_BS = jnp.pad(x_BS, ((0, 0), (0, -length % block)), constant_values=filling)
        return x_BS.reshape(batch, -1, block).swapaxes(0, 1)

    kv_heads = k_BSKH.shape[2]
    return _Blocks(
        _cut_rows(q_BSNH, kv_heads, block),
        _cut_rows(k_BSKH, kv_heads, block),
        _cut_rows(v_BSKH, kv_heads, block),
        cut_layout(layout.index, _BEYOND),
        cut_layout(layout.subtree_end, 0),
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


def _join_columns(x_IBKHC: Array, length: int) -> Array:
    _, batch, kv_heads, size, _ = x_IBKHC.shape
    x_BSKH = x_IBKHC.transpose(1, 0, 4, 2, 3).reshape(batch, -1, kv_heads, size)
    return x_BSKH[:, :length]


def _matmul(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=_accumulation_dtype(x))


def _accumulation_dtype(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
