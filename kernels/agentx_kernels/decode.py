"""Attention of a few new tokens over a KV cache, for prefill in pieces and for decoding.

The cache holds heads before columns, [B, K, S, H], so that the columns of one head are one matrix.
It is read, never written: the caller gets the layers' new keys and values from the model and writes
them once, which keeps XLA from copying the cache in every layer.

Left out: blocks over the cache. The scores of the T new tokens, [B, N, T, S + T], exist at once;
a long prompt should be fed in pieces.

Legend: B rows, T new tokens a row, S cache columns, N heads, K KV heads, G = N / K, H head size,
R = G * T rows of one KV head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k_new: Array,
    v_new: Array,
    *,
    lengths: Array,
    new_lengths: Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    scale: float | None = None,
) -> Array:
    """New tokens attend to what their row's cache holds, and causally to one another.

    q: float[B, T, N, H]; k_cache: [B, K, S, H]; v_cache: [B, K, S, Hv]; k_new: [B, K, T, H];
      v_new: [B, K, T, Hv]; N a multiple of K.
    lengths: i32[B], how many columns of each row's cache are filled; the rest must be finite.
    new_lengths: i32[B], how many of the T new tokens are real; all of them if None.
    window: a token sees itself and tokens less than `window` before it; all of them if None.
    softcap: scores become softcap * tanh(score / softcap).
    sinks: float[N], a score in each softmax of the head that has no value.
    scale: what the dot products are multiplied by; H ** -0.5 if None.

    Returns [B, T, N, Hv] in the type of v_new, 0 for new tokens that are not real. Softmax in f32
    (f64 for f64 inputs).

    Raises ValueError where shapes do not fit together.
    """
    _check(q, k_cache, v_cache, k_new, v_new, lengths, new_lengths)
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must be {q.shape[2:3]}, one for each head, not {sinks.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be 1 or more, or None for none")
    batch, num_new, heads, size = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    groups = heads // kv_heads
    scale = size**-0.5 if scale is None else scale

    column_T, column_S = jnp.arange(num_new), jnp.arange(capacity)
    allow_cache_BTS = (column_S < lengths[:, None])[:, None]
    allow_new_BTT = jnp.broadcast_to(column_T <= column_T[:, None], (batch, num_new, num_new))
    if window is not None:
        position_BT1 = (lengths[:, None] + column_T)[:, :, None]
        allow_cache_BTS = allow_cache_BTS & (column_S > position_BT1 - window)
        allow_new_BTT = allow_new_BTT & (column_T > column_T[:, None] - window)
    if new_lengths is not None:
        real_BT1 = (column_T < new_lengths[:, None])[:, :, None]
        allow_cache_BTS = allow_cache_BTS & real_BT1
        allow_new_BTT = allow_new_BTT & real_BT1

    q_BKGTH = q.reshape(batch, num_new, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    q_BKRH = q_BKGTH.reshape(batch, kv_heads, groups * num_new, size)

    def scores(k_BKCH: Array, allow_BTC: Array) -> Array:
        s_BKRC = _einsum("bkrh,bkch->bkrc", q_BKRH, k_BKCH) * scale
        if softcap is not None:
            s_BKRC = softcap * jnp.tanh(s_BKRC / softcap)
        s_BKGTC = s_BKRC.reshape(batch, kv_heads, groups, num_new, -1)
        return jnp.where(allow_BTC[:, None, None], s_BKGTC, -jnp.inf).reshape(s_BKRC.shape)

    s_cache_BKRS = scores(k_cache, allow_cache_BTS)
    s_new_BKRT = scores(k_new, allow_new_BTT)
    m_BKR1 = jnp.maximum(s_cache_BKRS.max(-1, initial=-jnp.inf), s_new_BKRT.max(-1))[..., None]
    if sinks is not None:
        sink_KR1 = jnp.repeat(sinks.reshape(kv_heads, groups), num_new, axis=1)[:, :, None]
        m_BKR1 = jnp.maximum(m_BKR1, sink_KR1.astype(m_BKR1.dtype))
    m_BKR1 = jnp.where(m_BKR1 == -jnp.inf, 0, m_BKR1)
    p_cache_BKRS = jnp.exp(s_cache_BKRS - m_BKR1)
    p_new_BKRT = jnp.exp(s_new_BKRT - m_BKR1)
    sum_BKR = p_cache_BKRS.sum(-1) + p_new_BKRT.sum(-1)
    if sinks is not None:
        sum_BKR += jnp.exp(sink_KR1 - m_BKR1)[..., 0]
    o_BKRH = _einsum("bkrs,bksh->bkrh", p_cache_BKRS.astype(v_cache.dtype), v_cache)
    o_BKRH += _einsum("bkrt,bkth->bkrh", p_new_BKRT.astype(v_new.dtype), v_new)
    o_BKRH /= jnp.where(sum_BKR > 0, sum_BKR, 1)[..., None]
    o_BKGTH = o_BKRH.astype(v_new.dtype).reshape(batch, kv_heads, groups, num_new, -1)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, heads, -1)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=acc_dtype)


def _check(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k_new: Array,
    v_new: Array,
    lengths: Array,
    new_lengths: Array | None,
) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dims, not the shape {x.shape}")
    batch, num_new, heads, size = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    value_size = v_cache.shape[3]
    if heads % kv_heads:
        raise ValueError(f"{heads} heads of q are no multiple of the cache's {kv_heads} KV heads")
    expected = {
        "k_cache": (k_cache, (batch, kv_heads, capacity, size)),
        "v_cache": (v_cache, (batch, kv_heads, capacity, value_size)),
        "k_new": (k_new, (batch, kv_heads, num_new, size)),
        "v_new": (v_new, (batch, kv_heads, num_new, value_size)),
        "lengths": (lengths, (batch,)),
        "new_lengths": (lengths if new_lengths is None else new_lengths, (batch,)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for q {q.shape} and k_cache {k_cache.shape}, "
                f"not {array.shape}"
            )
