"""Plain oracles: what each function of the library computes, written to be read.

The signatures are those of attention.py, decode.py and logprob.py without the arguments that say
how (hardware, blocks). Dense arrays of S x S and B x S x V: for tests and for reading. Under
jax.enable_x64 with f64 inputs all of it is f64.

Legend: B rows, S tokens, T new tokens, C columns seen, N heads, K KV heads, H head size, D model,
V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agentx_kernels.layout import TreeLayout, allow

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: TreeLayout,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See agentx_kernels.attention."""
    allowed = allow(layout)
    if window is not None:
        allowed &= layout.position[:, :, None] - layout.position[:, None, :] < window
    o, lse = _masked_attention(q, k, v, allowed, scale, softcap, sinks)
    return (o, lse) if return_lse else o


def decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k_new: Array,
    v_new: Array,
    *,
    lengths: Array,
    new_lengths: Array | None = None,
    scale: float | None = None,
) -> Array:
    """See agentx_kernels.decode."""
    batch, num_new = q.shape[:2]
    capacity = k_cache.shape[2]
    if new_lengths is None:
        new_lengths = jnp.full(batch, num_new)
    new_T = jnp.arange(num_new)
    cached_BTS = jnp.broadcast_to(
        jnp.arange(capacity) < lengths[:, None, None], (batch, num_new, capacity)
    )
    causal_BTT = jnp.broadcast_to(new_T <= new_T[:, None], (batch, num_new, num_new))
    real_BT1 = (new_T < new_lengths[:, None])[:, :, None]
    allow_BTC = jnp.concatenate([cached_BTS, causal_BTT], axis=-1) & real_BT1
    k_BCKH = jnp.concatenate([k_cache, k_new], axis=2).swapaxes(1, 2)
    v_BCKH = jnp.concatenate([v_cache, v_new], axis=2).swapaxes(1, 2)
    return _masked_attention(q, k_BCKH, v_BCKH, allow_BTC, scale)[0]


def token_logprobs(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    temperature: float | Array = 1.0,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """See agentx_kernels.logprob."""
    raw_BSV = jnp.einsum("bsd,vd->bsv", hidden, embedding, precision="highest")
    capped_BSV = raw_BSV if softcap is None else softcap * jnp.tanh(raw_BSV / softcap)
    logprobs_BSV = jax.nn.log_softmax(capped_BSV / jnp.asarray(temperature)[..., None])
    entropy_BS = -jnp.sum(jnp.exp(logprobs_BSV) * logprobs_BSV, axis=-1)
    chosen_BS = jnp.take_along_axis(logprobs_BSV, targets[..., None], axis=-1)[..., 0]
    return chosen_BS, jax.lax.stop_gradient(entropy_BS)


def _masked_attention(
    q_BTNH: Array,
    k_BCKH: Array,
    v_BCKH: Array,
    allow_BTC: Array,
    scale: float | None,
    softcap: float | None = None,
    sinks_N: Array | None = None,
) -> tuple[Array, Array]:
    scale = q_BTNH.shape[3] ** -0.5 if scale is None else scale
    groups = q_BTNH.shape[2] // k_BCKH.shape[2]
    k_BCNH = jnp.repeat(k_BCKH, groups, axis=2)
    v_BCNH = jnp.repeat(v_BCKH, groups, axis=2)
    allow_BNTC = allow_BTC[:, None]
    s_BNTC = scale * jnp.einsum("btnh,bcnh->bntc", q_BTNH, k_BCNH, precision="highest")
    if softcap is not None:
        s_BNTC = softcap * jnp.tanh(s_BNTC / softcap)
    sink_N11 = -jnp.inf if sinks_N is None else sinks_N[:, None, None]
    m_BNT1 = jnp.max(s_BNTC, axis=-1, keepdims=True, where=allow_BNTC, initial=-jnp.inf)
    m_BNT1 = jax.lax.stop_gradient(jnp.maximum(m_BNT1, sink_N11))
    some_BNT1 = m_BNT1 > -jnp.inf
    m_BNT1 = jnp.where(some_BNT1, m_BNT1, 0)
    below_BNTC = jnp.where(allow_BNTC, s_BNTC - m_BNT1, 0)
    p_BNTC = jnp.where(allow_BNTC, jnp.exp(below_BNTC), 0)
    sum_BNT1 = jnp.where(some_BNT1, p_BNTC.sum(-1, keepdims=True) + jnp.exp(sink_N11 - m_BNT1), 1)
    o_BTNH = jnp.einsum("bntc,bcnh->btnh", p_BNTC / sum_BNT1, v_BCNH, precision="highest")
    lse_BNT1 = jnp.where(some_BNT1, m_BNT1 + jnp.log(sum_BNT1), -jnp.inf)
    return o_BTNH, lse_BNT1[..., 0].swapaxes(1, 2)
